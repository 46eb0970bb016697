"""Which model to edit, and loading it."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from lit_edit.files.hub import hub_fault, reaching_hub
from lit_edit.models.packaged import PACKAGED, ModelUnavailableError, fetch, find_source
from lit_edit.models.products import Products
from lit_edit.models.spec import ArchSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Cut = tuple["DeviceMesh", torch.device]

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class LanguageModel:
    """The language model to edit.

    Args:
        name: A packaged model (see ``lit-edit models``), a local folder, or a hub id (owner/name).
        revision: Revision of a hub model.
        dtype: Floating type of the weights; ``auto`` takes the one they are stored in.
        attn_implementation: ``sdpa`` or ``eager``; by default what the model supports.
        trust_remote_code: Allow a hub model to bring code of its own. Off unless you ask for it.
        arch: Where an architecture that lit-edit does not know keeps its parts.
        products: Which kernel multiplies float32 matrices on a CPU: ``auto`` measures once and keeps the faster of
            those that are exact; name one (``torch``, ``onednn``) for equal round-off on different machines.
    """

    name: str = "smollm2-135m"
    revision: str | None = None
    dtype: DType = "float32"
    attn_implementation: Literal["sdpa", "eager"] | None = None
    trust_remote_code: bool = False
    arch: ArchSpec | None = None
    products: Products = "auto"
    _loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arch: ArchSpec | None = None
    ) -> LanguageModel:
        """Wrap a model that is in memory already; it will be edited in place."""
        wrapped = cls(name=getattr(model, "name_or_path", "") or type(model).__name__, arch=arch)
        object.__setattr__(wrapped, "_loaded", (model, tokenizer))
        return wrapped

    def load(self, cut: Cut | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer, the model in evaluation mode and frozen.

        Args:
            cut: The devices that the decoder layers are to be cut over, and this process's own.

        Raises:
            ModelUnavailableError: If there is no such model, or it cannot be fetched or read.
        """
        if self._loaded is not None:
            model, tokenizer = self._loaded[0].eval().requires_grad_(False), self._loaded[1]
            if cut is not None:
                from lit_edit.models.sharded_loading import cut_layers

                cut_layers(model.to(cut[1]), cut[0], self.arch)
            return model, tokenizer
        if self.name not in PACKAGED:
            return self._load(find_source(self.name), cut)
        try:
            return self._load(str(fetch(PACKAGED[self.name])), cut)
        except ModelUnavailableError as error:
            if not PACKAGED[self.name].is_cached:  # it was not to be had at all
                raise
            log.warning("the kept model is damaged and is fetched anew (%s)", str(error).partition("\n")[0])
            shutil.rmtree(PACKAGED[self.name].folder)
            return self._load(str(fetch(PACKAGED[self.name])), cut)

    def _load(self, source: str, cut: Cut | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        try:
            with quiet_loading(), nullcontext() if os.path.isdir(source) else reaching_hub():
                tokenizer = AutoTokenizer.from_pretrained(source, revision=self.revision, **options)
                if self.attn_implementation is not None:
                    options["attn_implementation"] = self.attn_implementation
                if cut is not None:
                    return self._load_in_parts(source, cut, dtype, options), tokenizer
                model = AutoModelForCausalLM.from_pretrained(
                    source, revision=self.revision, dtype=dtype or "auto", **options
                )
        except Exception as error:  # a damaged folder fails in many ways, which mean the same to the user
            raise ModelUnavailableError(
                f"the model {self.name!r} cannot be loaded: {hub_fault(error)}; use a packaged model "
                f"({', '.join(PACKAGED)}), a model folder (--model FOLDER), or a hub id that this machine can reach"
            ) from error
        return model.eval().requires_grad_(False), tokenizer

    def _load_in_parts(self, source: str, cut: Cut, dtype: Any, options: Mapping[str, Any]) -> PreTrainedModel:
        from huggingface_hub import snapshot_download

        from lit_edit.models.sharded_loading import load_in_parts

        if not os.path.isdir(source):
            source = snapshot_download(source, revision=self.revision, allow_patterns=["*.safetensors", "*.json"])
        return load_in_parts(Path(source), *cut, dtype, self.arch, **options)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' bar over the weights: it takes two seconds and says nothing."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
