r"""IKE: edits in the context (2305.12740).

Nothing is written and nothing is learnt: a prompt is put behind the facts that it is about, and behind demonstrations
of how a new fact is used,

.. code-block:: text

    New Fact: <another fact> <its new object>
    Prompt: <a prompt> <its answer>

    New Fact: <the edit's prompt> <the edit's object>
    Prompt: <the prompt>

Demonstrations show to copy a fact, to update an answer to another wording, and to retain the answer about another
subject, 1 : 3 : 4, as published; the most like one, which stands last, is a copy. They are those of a set whose prompts
are most like the edit's. A fact is found by the prompt: a sentence encoder compares it with the prompts of the edits
that hold.

The published evaluation knows which edit a prompt belongs to and always puts that one before it. Here nobody is told:
the nearest edit is meant, where it is near enough (``threshold``). Without demonstrations the method is ICE, facts
alone.

By nature IKE is not sequential: the model knows an edit only while it is in the context, edits do not build on each
other, and an edit whose wording is not recognised is not there. Nor is there an edited model to export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest, Probe
from lit_edit.data.sources import load_requests
from lit_edit.editors.base import EditorInfo, Status
from lit_edit.editors.lessons import target_probability
from lit_edit.editors.memory.engine import Kept, Learnt, MemoryEditor
from lit_edit.errors import ArgumentError, check_least, counted
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.encoder import MINILM, Encoder, load_encoder
from lit_edit.models.memory import Memory, Route
from lit_edit.text.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("copy", "update", "retain", "update", "retain", "update", "retain", "retain")
"""Kinds of demonstrations from the most like one on, over and over: one copy to three updates to four retains."""

ROOM = 64
"""Tokens of a model's context that are left for an answer."""


def with_fact(fact: str, prompt: str) -> str:
    r"""Return a prompt behind a fact: the form of demonstrations and questions alike.

    Example:
        >>> with_fact("The capital of Italy is Vienna", "Italy's capital is")
        "New Fact: The capital of Italy is Vienna\nPrompt: Italy's capital is"
    """
    return f"New Fact: {fact}\nPrompt: {prompt}"


def demonstration(request: EditRequest, kind: str, asked: str = "") -> str | None:
    r"""Return a demonstration made of another edit, or ``None`` if it has no probe of this kind.

    Args:
        request: The edit.
        kind: ``copy``, ``update`` or ``retain``.
        asked: The prompt that the demonstration will stand before; it must not give an answer away.

    Example:
        >>> request = EditRequest("1", "{} is in", "Rome", "Asia", neighborhood=(Probe("Oslo is in", "Europe"),))
        >>> demonstration(request, "retain")
        'New Fact: Rome is in Asia\nPrompt: Oslo is in Europe\n\n'
    """
    probes = {
        "copy": (Probe(request.text, request.target_new),),
        "update": tuple(Probe(text, request.target_new) for text in request.paraphrases),
        "retain": request.neighborhood,
    }[kind]
    probe = next((probe for probe in probes if probe.prompt.strip() != asked.strip()), None)
    if probe is None:
        return None
    fact = f"{request.text.strip()} {request.target_new.strip()}"
    return with_fact(fact, f"{probe.prompt.strip()} {probe.answer.strip()}") + "\n\n"


@dataclass(frozen=True)
class Fact:
    """An edit as a prompt finds it: by the vector ``(width,)`` of the edit's prompt, the subject filled in."""

    prompt: str
    subject: str
    target: str
    vector: Tensor


class Demonstrations:
    """Edits with probes, of which demonstrations are made; the encoder compares their prompts with an edit's."""

    def __init__(self, requests: Sequence[EditRequest], encoder: Encoder) -> None:
        self.requests = list(requests)
        self.vectors = encoder([request.text for request in self.requests]) if self.requests else torch.empty(0, 0)

    def near(self, fact: Fact, count: int) -> list[EditRequest]:
        """Return the requests most like an edit, the most like one first; none is about the edit's own subject."""
        if not count or not self.requests:
            return []
        order = (self.vectors @ fact.vector).argsort(descending=True, stable=True).tolist()
        others = (self.requests[i] for i in order if self.requests[i].subject.lower() != fact.subject.lower())
        return [request for request, _ in zip(others, range(count), strict=False)]


class Contexts(Memory):
    """Facts, those of the edits that hold, in order, that are put before the prompts they are about.

    Args:
        facts: The edits.
        encoder: Compares prompts.
        tokenizer: The model's; counts tokens.
        demonstrations: What demonstrations are made of.
        count: Demonstrations before a prompt, at most.
        edits: Facts before a prompt, at most.
        threshold: How like an edit's prompt a prompt must be; ``None``: the nearest edits are always meant.
        tokens: Of context and prompt together, at most.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        encoder: Encoder,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Demonstrations,
        count: int,
        edits: int,
        threshold: float | None,
        tokens: int,
    ) -> None:
        self.facts, self.encoder, self.tokenizer = list(facts), encoder, tokenizer
        self.demonstrations, self.count, self.edits = demonstrations, count, edits
        self.threshold, self.tokens = threshold, tokens
        self.vectors = torch.stack([fact.vector for fact in facts]) if facts else torch.empty(0, 0)
        self._near: dict[int, list[EditRequest]] = {}
        self._length = lru_cache(maxsize=4096)(lambda text: len(encode(tokenizer, text)))

    def routes(self, prompts: Sequence[str]) -> list[Route[ModelAdapter]] | None:
        """Return what is put before each prompt."""
        if not self.facts or not prompts:
            return None
        similar = self.encoder(prompts) @ self.vectors.T
        # Of edits that are alike the newest is meant.
        order = len(self.facts) - 1 - similar.flip(1).argsort(dim=1, descending=True, stable=True)[:, : self.edits]
        routes: list[Route[ModelAdapter]] = []
        for prompt, row, nearest in zip(prompts, similar, order.tolist(), strict=True):
            near = [i for i in nearest if self.threshold is None or float(row[i]) >= self.threshold]
            routes.append(Route(self._context(prompt, near)) if near else Route())
        return routes

    def _context(self, prompt: str, near: Sequence[int]) -> str:
        """Return facts and demonstrations, the nearest last, as many as fit: demonstrations go first, then facts."""
        room = self.tokens - self._length(prompt)
        while near:
            facts = [self.facts[i] for i in near]
            told = "\nNew Fact: ".join(f"{f.prompt.strip()} {f.target.strip()}" for f in reversed(facts))
            question = with_fact(told, "")
            shown = self._shown(near[0], prompt)
            while shown and self._length("".join(shown) + question) > room:
                shown = shown[1:]
            if shown or self._length(question) <= room:
                return "".join(shown) + question
            near = near[:-1]
        return ""

    def _shown(self, nearest: int, prompt: str) -> list[str]:
        """Return the demonstrations for an edit, the most like one last."""
        if nearest not in self._near:
            # A few more than wanted: some may lack a probe of their kind.
            self._near[nearest] = self.demonstrations.near(self.facts[nearest], 2 * self.count)
        shown: list[str] = []
        for request in self._near[nearest]:
            if len(shown) < self.count:
                text = demonstration(request, KINDS[len(shown) % len(KINDS)], prompt)
                shown += [] if text is None else [text]
        return shown[::-1]


class IKE(MemoryEditor):
    """Put each edit, as text, before the prompts that are about it; see :mod:`lit_edit.editors.memory.ike`.

    Args:
        encoder: The sentence encoder that finds edits and demonstrations: a packaged one, a folder, or a hub id.
        threshold: How like an edit's prompt another prompt must be (cosine) to be about it; ``null``: the nearest edit
            is always meant, which changes what the model says of everything.
        edits: Facts that are put before a prompt, at most.
        demonstrations: How many stand before them; 0 is ICE.
        demonstration_path: File of edits with paraphrases and neighbours that demonstrations are made of; by default
            the built-in facts.
        tokens: Longest context in tokens, the prompt included; by default the model's. Where it does not suffice, the
            demonstrations least like the edit are left out first, then the facts least like the prompt.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="IKE",
        paper="Can We Edit Factual Knowledge by In-Context Learning?, 2305.12740",
        kind="in context",
        cost="a pass of the sentence encoder; each prompt it concerns is longer by the context (some 500 tokens)",
        state="text and an embedding per edit; every prompt is compared with all of them",
        undo="exact",
        lacks="sequential editing (the model knows an edit only while it is in the context, and a prompt is answered "
        "by the nearest edits alone); a model to export",
    )

    depends_on = "encoder threshold edits demonstrations tokens"

    def __init__(
        self,
        encoder: str = MINILM,
        threshold: float | None = None,
        edits: int = 1,
        demonstrations: int = 16,
        demonstration_path: str | None = None,
        tokens: int | None = None,
    ) -> None:
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold is a cosine, from -1 to 1, got {threshold}")
        check_least(1, edits=edits, tokens=tokens)
        check_least(0, demonstrations=demonstrations)
        self.encoder, self.threshold, self.edits = encoder, threshold, edits
        self.demonstrations, self.demonstration_path, self.tokens = demonstrations, demonstration_path, tokens

    def load_encoder(self) -> Encoder:
        """Return the sentence encoder."""
        return load_encoder(self.encoder)

    def set_up(self, status: Status) -> None:
        """Load the encoder and what demonstrations are made of."""
        config = self.ledger.adapter.model.config
        longest = int(getattr(config, "max_position_embeddings", 1024))  # GPT-2 has it under this name, too
        if self.tokens is not None and self.tokens > longest:
            raise ArgumentError(f"tokens={self.tokens}: the model reads {longest} at most")
        self._room = (self.tokens or longest) - ROOM
        if self._room <= 0:
            raise ArgumentError(f"tokens={self.tokens or longest} leaves no room: {ROOM} are kept for an answer")
        status(f"loading the sentence encoder {self.encoder}")
        self._encode = self.load_encoder()
        requests: list[EditRequest] = []
        if self.demonstrations:
            path = self.demonstration_path
            requests, _ = load_requests("builtin" if path is None else "file", path)
            status(f"reading {counted(len(requests), 'fact')} for demonstrations")
        self._shown = Demonstrations(requests, self._encode)

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on; demonstrations by what they are made of."""
        made_of = json.dumps([request.as_dict() for request in self._shown.requests], sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        return {**super().settings(), "made_of": digest}

    def memory_of(self, kept: Sequence[Kept]) -> Contexts:
        """Return the contexts of some edits."""
        return self._contexts(
            [Fact(k.entry.prompt, k.entry.subject, k.entry.target_new, k.tensors["vector"]) for k in kept]
        )

    def _contexts(self, facts: Sequence[Fact]) -> Contexts:
        return Contexts(
            facts,
            self._encode,
            self.tokenizer,
            self._shown,
            self.demonstrations,
            self.edits,
            self.threshold,
            self._room,
        )

    def learn(self, requests: Sequence[EditRequest], kept: Sequence[Kept], status: Status) -> list[Learnt]:
        """Return each edit's vector, and what the model says of it with and without the context."""
        probability = partial(target_probability, self.ledger.original(), self.tokenizer)
        learnt = []
        for request, vector in zip(requests, self._encode([request.text for request in requests]), strict=True):
            status(f"looking up demonstrations for {request.subject!r}")
            alone = self._contexts([Fact(request.text, request.subject, request.target_new, vector)])
            route = (alone.routes([request.text]) or [Route()])[0]
            facts = {
                "target_probability_before": probability(request.text, request.target_new),
                "target_probability": probability(route.context + request.text, request.target_new),
            }
            learnt.append(Learnt({"vector": vector}, facts))
        return learnt
