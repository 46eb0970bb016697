"""The parts of the published protocols that need generated texts, probes by kind, or the whole stream."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_edit.data.request import EditRequest
from lit_edit.errors import check_known
from lit_edit.files.paths import expand, write_text
from lit_edit.metrics.ages import aged
from lit_edit.metrics.evaluation import flatten
from lit_edit.metrics.generated import (
    ByKindResult,
    GenerationResult,
    evaluate_generation,
    evaluate_portability,
    summarise_generation,
    summarise_portability,
)
from lit_edit.metrics.published import PUBLISHED, ProtocolName, as_published
from lit_edit.metrics.texts import fit_vectorizer, load_vectorizer, read_references
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.edit_stream import EditStream

from .base import StagedCallback, check_every

log = logging.getLogger(__name__)


class ProtocolMetrics(StagedCallback):
    """Measures what takes longer than scoring: generated texts and answers, portability, and forgetting by age.

    Fluency, consistency, generated answers, portability and locality by kind are measured over a fixed sample of the
    stream: before the first edit, at the end, and after every ``every`` edits if wanted; of the edits of the sample
    that hold then. The age curves are of all edits, at the end. All of it stands in ``summary.json`` under ``base`` and
    ``final``, and the curves under ``age_curves``; the texts of the end are in ``generations.jsonl``. List it before
    ``RunFolder``, which writes the summary.

    Args:
        every: Measure after every so many edits as well; 0 measures before the first one and at the end.
        sample: Measure at most this many edits, chosen at random; 0 measures all.
        seed: Seeds the choice and the drawing of texts. A text depends on the seed, the edit and its prompt alone.
        prompts: Generation prompts per edit, the first ones; 0 takes all, as published.
        top_k: Draw from this many of the most probable tokens; 5 as published.
        length: Tokens of a text with its prompt; 100 as published.
        references: File of texts about the new objects, for edits that bring none: CounterFact's
            ``attribute_snippets.json``, or records of ``{target, text}``.
        term_weights: Folder with the published ``idf.npy`` and ``tfidf_vocab.json``; by default the term weights are
            those of the references of the stream.
        ends: Edits on either side that count as early and late, or a share of all.
        bins: Points of the age curves.
        published: Also put the end into the summary under the names of a protocol, times 100.
        batch_rows: Texts that are written together.
        folder: The run folder; by default the Trainer's ``default_root_dir``.
    """

    measured_by = "how"

    def __init__(
        self,
        every: int = 0,
        sample: int = 20,
        seed: int = 0,
        prompts: int = 0,
        top_k: int = 5,
        length: int = 100,
        references: str | None = None,
        term_weights: str | None = None,
        ends: int | float = 100,
        bins: int = 20,
        published: ProtocolName | None = None,
        batch_rows: int = 64,
        folder: str | None = None,
    ) -> None:
        for low, counts in (
            (0, {"every": every, "sample": sample, "prompts": prompts}),
            (1, {"top_k": top_k, "length": length, "bins": bins, "batch_rows": batch_rows}),
        ):
            for name, value in counts.items():
                check_every(value, f"ProtocolMetrics: {name}", low)
        if not ends > 0 or (ends >= 1 and ends != int(ends)):
            raise ValueError(f"ProtocolMetrics: ends must be a number of edits or a share below 1, got {ends}")
        if published is not None:
            check_known(PUBLISHED, **{"ProtocolMetrics: published": published})
        super().__init__(every)
        self.sample, self.seed = sample, seed
        self.writing = {"top_k": top_k, "length": length, "max_prompts": prompts or None, "batch_rows": batch_rows}
        self.references, self.term_weights = references, term_weights
        self.ends, self.bins, self.published, self.folder = ends, bins, published, folder
        self._base: dict[str, tuple[GenerationResult, ByKindResult]] = {}
        self.kept["base"] = "_base_state"
        self._filed: dict[tuple[str, str], list[str]] = {}
        self._chosen: list[EditRequest] = []
        self._vectorizer: Any = None

    # ---- the stream ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the files: what is wrong with them is to be known before the first edit."""
        if self.references is not None:
            self._filed = read_references(expand(self.references))
        if self.term_weights is not None:
            self._vectorizer = load_vectorizer(expand(self.term_weights))

    def begin(self, stream: EditStream) -> None:
        """Measure the unedited model on what of the sample was not."""
        if not self._chosen:
            self._choose(stream)
        if missing := [request for request in self._chosen if request.id not in self._base]:
            summary, results = self._measure(stream, stream.ledger.original(), missing)
            self._base |= results
            if len(missing) == len(self._chosen):
                stream.log_at_edit(flatten(summary, "base"))

    def go_on(self, stream: EditStream) -> None:
        """Measure the edits of the sample that hold."""
        start = perf_counter()
        summary, _ = self._measure(stream, stream.adapter, self._holding(stream))
        self.history.append({"edits": stream.edit_number, "summary": summary})
        stream.log_at_edit({**flatten(summary, "protocol"), "time/protocol": perf_counter() - start})

    def end(self, stream: EditStream) -> None:
        """Measure the edits of the sample that hold, and the age curves of all."""
        requests = self._holding(stream)
        summary, results = self._measure(stream, stream.adapter, requests)
        curves = self._ages(stream)
        summary["age"] = {name: {k: v for k, v in found.items() if k != "curve"} for name, found in curves.items()}
        stream.extra.setdefault("final", {}).update(summary)
        stream.extra.setdefault("base", {}).update(self._summarise([self._base[r.id] for r in requests]))
        stream.extra["age_curves"] = {name: found["curve"] for name, found in curves.items()}
        if self.history:
            stream.extra["protocol"] = self.history
        if self.published is not None:
            stream.extra["published"] = {
                stage: as_published(stream.summary()[stage], self.published) for stage in ("base", "final")
            }
        stream.log_at_edit(flatten(summary, "final"))
        if stream.ranks.leads:
            self._write(Path(self.folder or stream.trainer.default_root_dir), requests, results)

    # ---- measuring ----------------------------------------------------------------------------------------------

    def _choose(self, stream: EditStream) -> None:
        """Choose the sample, in the stream's order, and give its edits their references."""
        requests = [self._with_references(request) for request in stream.stream_requests()]
        known = [request.references for request in requests if request.references]
        if known and self._vectorizer is None:
            self._vectorizer = fit_vectorizer(known)
        count = min(self.sample or len(requests), len(requests))
        self._chosen = [requests[at] for at in sorted(random.Random(self.seed).sample(range(len(requests)), count))]
        if self.references is not None and not any(request.references for request in self._chosen):
            log.warning("%s: holds nothing about the new object of any edit measured", self.references)

    def _with_references(self, request: EditRequest) -> EditRequest:
        if request.references:
            return request
        names = [name for name in (request.target_id, request.target_new) if name]
        keys = [(relation, name) for relation in (request.relation, "") for name in names]
        texts = next((self._filed[key] for key in keys if key in self._filed), ())
        return replace(request, references=tuple(texts)) if texts else request

    def _holding(self, stream: EditStream) -> list[EditRequest]:
        """Return the edits of the sample that hold, as the sample has them."""
        holding = {entry.id for entry in stream.ledger.entries}
        return [request for request in self._chosen if request.id in holding]

    def _measure(
        self, stream: EditStream, adapter: ModelAdapter, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Any], dict[str, tuple[GenerationResult, ByKindResult]]]:
        stream.status("writing texts")
        with stream.measuring():
            generated = evaluate_generation(
                adapter,
                stream.tokenizer,
                requests,
                seed=self.seed,
                vectorizer=self._vectorizer,
                progress=lambda done, total: stream.status(f"writing texts: {done} of {total}"),
                **self.writing,  # type: ignore[arg-type]
            )
            stream.status("measuring portability")
            by_kind = evaluate_portability(adapter, stream.tokenizer, requests)
        results = {result.id: (result, kinds) for result, kinds in zip(generated, by_kind, strict=True)}
        return self._summarise(list(results.values())), results

    def _summarise(self, results: Sequence[tuple[GenerationResult, ByKindResult]]) -> dict[str, Any]:
        before = {name: kinds for name, (_, kinds) in self._base.items()}
        return {
            "sample": len(results),
            **summarise_generation(result for result, _ in results),
            **summarise_portability([kinds for _, kinds in results], before),
        }

    def _ages(self, stream: EditStream) -> dict[str, dict[str, Any]]:
        """Return the curves of all edits that hold, in the order of making."""
        final = stream.results["final"]
        probes = [final[entry.id].efficacy[0] for entry in stream.ledger.entries]
        values: dict[str, list[float | None]] = {
            "success": [None if p.other is None else float(p.preferred < p.other) for p in probes],
            "accuracy": [float(all(p.hits)) for p in probes],
        }
        width = max(1, -(-len(probes) // self.bins))
        return {name: aged(found, width, self.ends) for name, found in values.items()}

    def _write(
        self,
        folder: Path,
        requests: Sequence[EditRequest],
        results: dict[str, tuple[GenerationResult, ByKindResult]],
    ) -> None:
        rows: list[dict[str, str]] = []
        for request in requests:
            found, one = results[request.id][0], {"id": request.id}
            rows += [{**one, "prompt": request.text, "target": a.target, "answer": a.text} for a in found.efficacy]
            written = zip(request.generation, found.texts, strict=False)
            rows += [{**one, "prompt": prompt, "text": text} for prompt, text in written]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "generations.jsonl", text)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    @property
    def _base_state(self) -> list[list[dict[str, Any]]]:
        """What was measured of the unedited model, without the texts."""
        return [[generated.as_state(), asdict(kinds)] for generated, kinds in self._base.values()]

    @_base_state.setter
    def _base_state(self, state: list[list[dict[str, Any]]]) -> None:
        self._base = {
            kinds["id"]: (GenerationResult.from_state(generated), ByKindResult(**kinds)) for generated, kinds in state
        }

    def how(self) -> dict[str, Any]:
        """Return the settings on which the numbers depend."""
        how = {name: value for name, value in self.writing.items() if name != "batch_rows"}
        return {**how, "sample": self.sample, "seed": self.seed, "files": [self.references, self.term_weights]}
