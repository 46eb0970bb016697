r"""SERAC: an edit memory, a scope classifier and a counterfactual model (2206.06520).

The model is left as it is. Each prompt :math:`x` is compared with all edits; where the classifier finds it in the scope
of one, the counterfactual model answers, which reads that edit before the prompt; else the model itself does:

.. math::
    f(x) = \begin{cases} f_c(e_{i^*} \,\Vert\, x) & p(x, e_{i^*}) > \tfrac12, \quad i^* = \arg\max_i p(x, e_i) \\
    f_0(x) & \text{otherwise.} \end{cases}

Both networks are trained before the first edit, by ``lit-edit fit --config train/serac``; edits are only noted down.

Published, the classifier is a DistilBERT of its own that is fine-tuned, and :math:`p = \exp(-s \lVert e(x) - e(x_i)
\rVert^2)`; here it is a small head over the embeddings of a frozen sentence encoder, so that hundreds of records and
minutes are enough. The counterfactual model is a small model of the same vocabulary, fine-tuned as a whole; here an
update of low rank is trained on it, and it may be the edited model itself, which then is not loaded twice.

By nature SERAC needs training data like the edits to come, and learns nothing from the edits themselves: what one of
them implies, the counterfactual model says only if it follows from reading it. It is trained to say the new object, and
what it writes behind that is poor: a small model tends to repeat it. There is no edited model to export.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import EditorInfo, Status
from lit_edit.editors.lessons import target_probability
from lit_edit.editors.memory.engine import Kept, Learnt, MemoryEditor
from lit_edit.editors.memory.serac_network import (
    HOW_TO_TRAIN,
    ScopeClassifier,
    SeracNetwork,
    fingerprint,
    record_number,
    stated,
)
from lit_edit.errors import ArgumentError, NotHereError, shorten
from lit_edit.files.checksum import checksum
from lit_edit.files.paths import expand
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.encoder import Encoder, load_encoder
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.memory import Memory, Route

log = logging.getLogger(__name__)


class EditMemory(Memory):
    """Edits as text, and who answers what.

    Args:
        texts: The edits that hold, in order, as the counterfactual model reads them.
        vectors: The embeddings of their prompts, each ``(width,)``.
        encoder: Embeds prompts.
        classifier: Tells which edit a prompt is about.
        counterfactual: The model that answers then.
        threshold: Probability above which a prompt is in an edit's scope.
    """

    def __init__(
        self,
        texts: Sequence[str],
        vectors: Sequence[Tensor],
        encoder: Encoder,
        classifier: ScopeClassifier,
        counterfactual: ModelAdapter,
        threshold: float,
    ) -> None:
        self.texts, self.encoder, self.classifier = list(texts), encoder, classifier
        self.counterfactual, self.threshold = counterfactual, threshold
        self.vectors = torch.stack(list(vectors)) if vectors else torch.empty(0, classifier.width)

    def routes(self, prompts: Sequence[str]) -> list[Route[ModelAdapter]] | None:
        """Return who answers each prompt, and what is put before it."""
        if not self.texts or not prompts:
            return None
        inside = self.classifier.table(self.encoder(prompts), self.vectors)
        # Of edits that are alike the newest is meant.
        best = len(self.texts) - 1 - inside.flip(1).argmax(1)
        return [
            Route(self.texts[i], self.counterfactual) if float(row[i]) > self.threshold else Route()
            for row, i in zip(inside, best.tolist(), strict=True)
        ]


class SERAC(MemoryEditor):
    """Note edits down; a trained classifier and a trained small model use them; see this module.

    Args:
        network: The run folder of ``lit-edit fit --config train/serac``, or the ``network.safetensors`` in it.
        threshold: Probability above which a prompt is in an edit's scope.
        counterfactual: The small model that answers within the scope, with the update that was trained: a packaged
            one, a folder, or a hub id; by default the one it was trained on.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="SERAC",
        paper="Memory-Based Model Editing at Scale, 2206.06520",
        kind="memory",
        cost="a pass of the sentence encoder (the networks are trained once, before)",
        state="text and an embedding per edit; every prompt is compared with all of them; a counterfactual model",
        undo="exact",
        lacks="editing without training data (lit-edit fit --config train/serac comes first); good text behind the new "
        "object within the scope (a small model writes it); a model to export",
    )

    def __init__(self, network: str | None = None, threshold: float = 0.5, counterfactual: str | None = None) -> None:
        if not network:
            raise NotHereError(f"SERAC needs a trained network: {HOW_TO_TRAIN}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a probability, from 0 to 1, got {threshold}")
        self.network, self.threshold, self.counterfactual = network, threshold, counterfactual

    def load_encoder(self, name: str) -> Encoder:
        """Return the sentence encoder that the classifier was trained on."""
        return load_encoder(name)

    def set_up(self, status: Status) -> None:
        """Load the networks."""
        self._trained, known, self._seen = SeracNetwork.load(expand(self.network))
        status(f"loading the sentence encoder {known['encoder']}")
        self._encode = self.load_encoder(known["encoder"])
        small = self._small_model(known, status)
        fits = all(
            layer < small.n_layers
            and small.shape(layer) == (len(self._trained.up[str(layer)]), self._trained.down[str(layer)].shape[1])
            for layer in self._trained.layers
        )
        if not fits:
            raise ArgumentError(
                f"network={self.network}: it was trained on {known['language_model']}, whose layers have other sizes "
                f"than those of {self.counterfactual or 'the model at hand'}"
            )
        with torch.no_grad():
            self._answers = small.with_weights(self._trained.to(small.device).weights(small))
        self._trained.classifier.cpu()

    def _small_model(self, known: dict[str, Any], status: Status) -> ModelAdapter:
        """Return the model that the update was trained on: the one at hand, if it is that one."""
        base = self.ledger.original()
        layer = max(self._trained.layers)
        here = layer < base.n_layers and fingerprint(base.weight(layer)) == known["checksum"]
        if here and self.counterfactual is None:
            return base
        name = self.counterfactual or known["language_model"]
        status(f"loading the counterfactual model {name}")
        model, tokenizer = LanguageModel(name).load()
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ArgumentError(
                f"the counterfactual model {name} has another vocabulary than the model that is edited; train a "
                "network on a small model of the same family"
            )
        small = ModelAdapter(model.to(base.device))  # type: ignore[arg-type]
        small.ranks = base.ranks
        if fingerprint(small.weight(layer)) != known["checksum"]:
            log.warning("the counterfactual model %s is not the one that network %s was trained on", name, self.network)
        return small

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on; the network by what it holds."""
        held = [checksum(value.reshape(len(value), -1)) for value in self._trained.state_dict().values()]
        return {**super().settings(), "network": held, "threshold": self.threshold, "model": self.counterfactual}

    def memory_of(self, kept: Sequence[Kept]) -> EditMemory:
        """Return the memory of some edits."""
        return EditMemory(
            [stated(k.entry.prompt, k.entry.target_new) for k in kept],
            [k.tensors["vector"] for k in kept],
            self._encode,
            self._trained.classifier,
            self._answers,
            self.threshold,
        )

    def learn(self, requests: Sequence[EditRequest], kept: Sequence[Kept], status: Status) -> list[Learnt]:
        """Return each edit's vector, and what the two models say of it."""
        base, answers, learnt = self.ledger.original(), self._answers, []
        for request, vector in zip(requests, self._encode([request.text for request in requests]), strict=True):
            if record_number(request.text) in self._seen:
                log.warning(
                    "edit %s (%s) is one that the network was trained on: what is measured of it flatters",
                    request.id,
                    shorten(request.text),
                )
            status(f"noting down {request.subject!r}")
            target, read = request.target_new, stated(request.text, request.target_new) + request.text
            facts = {
                "target_probability_before": target_probability(base, self.tokenizer, request.text, target),
                "target_probability": target_probability(answers, self.tokenizer, read, target),
                "own_scope": float(self._trained.classifier.table(vector[None], vector[None])),
            }
            learnt.append(Learnt({"vector": vector}, facts))
        return learnt
