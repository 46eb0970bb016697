"""GPT-J. Attention and MLP run in parallel on one norm; the head has a bias."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="gptj",
    layers="transformer.h",
    down_proj="mlp.fc_out",
    norm="transformer.ln_f",
    model_types=("gptj",),
)
