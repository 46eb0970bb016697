"""GPT-2 (also DistilGPT-2). Its projections are ``Conv1D``: weights are stored ``(d_in, d_out)``."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="gpt2",
    layers="transformer.h",
    down_proj="mlp.c_proj",
    norm="transformer.ln_f",
    model_types=("gpt2",),
)
