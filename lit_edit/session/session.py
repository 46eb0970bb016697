"""A model whose facts are edited, one call after another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_edit.data.request import EditRequest
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import expand
from lit_edit.metrics.evaluation import Summary, summarise
from lit_edit.models.generation import continue_greedily
from lit_edit.session.answers import Answer, EditList
from lit_edit.session.changing import Changing
from lit_edit.session.shown import Shown


class Session(Changing):
    """A model that is edited: made by :func:`lit_edit.open`, one per model.

    It makes edits (:meth:`edit`), takes them out and puts them back, asks both models, lists and measures what was
    done, and takes it away. Arguments and attributes are those of :class:`Changing`.
    """

    def ask(self, *prompts: str, tokens: int = 20) -> list[Answer]:
        """Return how the original and the edited model continue some prompts, greedily.

        Args:
            *prompts: The prompts.
            tokens: Length of the continuation.
        """
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts) or tokens < 1:
            raise ArgumentError("ask wants prompts, as text, and tokens of at least 1")
        original = self.ledger.original()
        return [
            Answer(p, *(continue_greedily(view, self.tokenizer, p, tokens) for view in (original, self.adapter)))
            for p in prompts
        ]

    def measure(self) -> Summary:
        """Return efficacy, generalization and locality over all edits that hold, of the model as it is now."""
        requests = [EditRequest.from_dict(entry.request) for entry in self.ledger.entries]
        with Shown(self.progress, 1, "pass") as shown:
            shown.status("measuring")
            self._measure("base", requests, self.ledger.original())
            held = tuple(entry.number for entry in self.ledger.entries)
            if self._measured_at != held:
                self._measure("final", requests, self.adapter)
                self._measured_at = held
        found = [self.results["final"][request.id] for request in requests]
        return summarise(found, {request.id: self.results["base"][request.id] for request in requests})

    def log(self, measure: bool = True) -> EditList:
        """Return what has become of each edit: it prints as a table, and is a list of dictionaries.

        Args:
            measure: Measure the edits that hold on the model as it is now; else say what is known of them.
        """
        from lit_edit.runs.reading import log_of

        if measure and self.ledger.entries:
            self.measure()
        return EditList(log_of(self.ledger.history, self.ledger.journal.records, self.results, self.tokenizer))

    # ---- taking away -------------------------------------------------------------------------------------------------

    def export(
        self, path: str | Path, kind: Literal["model", "delta", "lora"] = "model", rank: int | None = None
    ) -> Path:
        """Write the edits as something to take away.

        Args:
            path: A new folder (for a delta, a new file).
            kind: A Hugging Face folder with the whole edited model, a file of what was added to the weights
                (:func:`lit_edit.apply_delta`), or a LoRA adapter for ``peft``.
            rank: Largest rank of the adapter.

        Raises:
            ExportError: If it cannot be written, or there is nothing to take away.
            WeightsChangedError: If somebody else has written the model's weights.
        """
        from lit_edit.export.delta import export_delta
        from lit_edit.export.lora import export_lora
        from lit_edit.export.model import export_model

        if kind not in ("model", "delta", "lora") or (rank is not None and kind != "lora"):
            raise ArgumentError(
                f"kind must be model, delta or lora, and rank belongs to lora; got {kind!r}, rank {rank}"
            )
        self.ledger.verify(thorough=True)
        path = expand(path)
        if kind == "model":
            return export_model(self.model, self.tokenizer, self.ledger, path, self.language_model.name)
        if kind == "delta":
            return export_delta(self.ledger, path, self.base_hash, self.language_model)
        export_lora(self.ledger, path, self.language_model, rank)
        return path

    def save(self, folder: str | Path | None = None) -> Path:
        """Keep the session in a folder, in which it goes on from now: :func:`lit_edit.resume` takes it up.

        The folder is that of a run: ``lit-edit log``, ``ask``, ``undo`` and ``export`` read it too, where its model can
        be loaded by name.

        Args:
            folder: A new folder; by default the one in which the session is kept already.

        Raises:
            ArgumentError: If there is none, or the editor cannot be described in a file.
            RunError: If the folder holds something else.
        """
        from lit_edit.session.saved import save, write_files

        self.ledger.verify(thorough=True)
        place = save(self, None if folder is None else expand(folder))
        self._end()
        if self.ledger.entries:
            self.measure()
        write_files(self, place)
        return place
