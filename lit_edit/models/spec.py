"""Where an architecture family keeps the parts that editing touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ArchSpec:
    """Names of the modules of a decoder-only model, as dotted paths.

    A family is described once, by names and never by tensor shapes: square matrices and transposed layouts would fool
    any guess (see :meth:`lit_edit.models.ModelAdapter.to_layout`).

    Args:
        family: A name for people, for example ``"llama"``.
        layers: Path from the model to the list of decoder layers, for example ``"model.layers"``.
        down_proj: Path from one decoder layer to the MLP down projection, the matrix that is edited, for example
            ``"mlp.down_proj"``. Its input at the lookup token is the key of a fact. Several paths where layers differ:
            the first that a layer has counts.
        norm: Path from the model to the final norm, or ``None`` when the model has none.
        head: Path from the model to the language-model head; by default what ``get_output_embeddings()`` returns.
        post_norm: Path to a module that stands between final norm and head (OPT-350m projects out there), or ``None``.
        output_norm: Path from one decoder layer to an RMS norm between the down projection and the residual stream
            (Gemma 2 and 3, OLMo 2, GLM 4), or ``None``.
        output_scale: Name of the config attribute that multiplies what a layer adds to the residual stream
            (Granite), or ``None``.
        logit_softcap: Name of the config attribute that caps the logits (Gemma 2), or ``None``.
        model_types: Values of ``config.model_type`` that this description covers.
        tail: How logits are made of the last layer's output: by the ``parts`` named here, or by the ``model`` itself,
            run without its layers, whatever it does there (scales, caps, several norms).
        rows: How the rows of a batch are run through single layers: as one ``packed`` line of tokens, ``padded`` from
            where they are to be run on, or ``whole``, which any causal layer bears; found out when not given.
    """

    family: str
    layers: str
    down_proj: str | tuple[str, ...]
    norm: str | None
    head: str | None = None
    post_norm: str | None = None
    output_norm: str | None = None
    output_scale: str | None = None
    logit_softcap: str | None = None
    model_types: tuple[str, ...] = ()
    tail: Literal["parts", "model"] = "parts"
    rows: Literal["packed", "padded", "whole"] | None = None
