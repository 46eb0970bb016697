"""SimIE: makes an editor for single edits one for streams."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import algebra_device, algebra_dtype, for_algebra, without_autocast
from lit_edit.editors.base import Editor, EditorInfo, Moments, Proposal, Status, Step, silent
from lit_edit.editors.closed_form.trial import Trial, absorb
from lit_edit.errors import ArgumentError, check_positive
from lit_edit.ledger.edit_ledger import Change, EditLedger, LayerUpdate, LedgerEntry, RecordedFacts
from lit_edit.ledger.history import EditHistory
from lit_edit.ledger.journal import Journal
from lit_edit.models.packed import TokenRows
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.shared import SharedSolver, Solver
from lit_edit.solvers.storage import SolverStorage
from lit_edit.text.tokens import continuation, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.stats.second_moment import KeyStatistics


class SimIE(Editor):
    r"""Simulating an ideal editor (Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025, eq. 9).

    For each edit the base editor makes it, alone, on the original weights, :math:`W_0 + \Delta^e`, and is taken at its
    word at all tokens of the edit's prompt and target: the stream's update is to say there what :math:`\Delta^e` says:
    it is :math:`\Delta_t = \Delta_{t-1} + (\Delta^e - \Delta_{t-1}) K K^\top P_t`, with :math:`P_t` the inverse of
    the sum :math:`\alpha I + \sum K K^\top`. That is ridge regression from the original weights with the facts
    :math:`(K, \Delta^e K)` and the prior :math:`\alpha I`, and it is solved as such, recursively. Facts depend on no
    other edit, so taking one out is exact.

    Args:
        base: The editor that makes the single edits: any that writes weights.
        alpha: :math:`\alpha`, how much a change weighs at keys that no edit has. Published 1e4 for large models.
        storage: Type and place of the solver's matrices, beside the base editor's own.
    """

    about = EditorInfo(
        title="SimIE",
        paper="Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025 (openreview VdEG08ZJCH)",
        kind="closed form",
        cost="an edit of the base editor on the original weights; tokens times d_in^2 per layer",
        state="3 d_in^2 + d_in d_out per layer, whatever the number of edits; and the base editor's",
        undo="exact",
        lora=True,
        devices=True,
        lacks="knows what ordinary text needs only as far as the base editor does: its own prior is isotropic",
    )

    def __init__(
        self,
        base: Editor,
        alpha: float = 1.0,
        storage: SolverStorage = SolverStorage(),  # noqa: B008 - frozen
    ) -> None:
        if isinstance(base, SimIE):
            raise ValueError("base must be an editor for single edits, got SimIE itself")
        check_positive(alpha=alpha)
        self.base, self.alpha, self.storage = base, alpha, storage
        self.solvers: dict[int, Solver] = {}

    depends_on = "alpha"

    @property
    def exact_undo(self) -> bool:
        """Facts depend on no other edit."""
        return True

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers of the base editor."""
        return self.base.resolve_layers(adapter)

    def prepare(
        self,
        ledger: EditLedger,
        tokenizer: PreTrainedTokenizerBase,
        statistics: KeyStatistics | Mapping[int, Tensor],
        status: Status = silent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare the base editor, on a ledger of its own in which nothing is ever written; see :class:`Editor`."""
        super().prepare(ledger, tokenizer, statistics, status, progress)
        self.base.prepare(self._aside, tokenizer, statistics, status, progress)

    def _begin(self, moments: Moments, status: Status) -> None:
        ledger = self.ledger
        self._aside = copy.copy(ledger)
        self._aside.deltas, self._aside.history = {}, EditHistory()
        self._aside.journal, self._aside.position = Journal(), 0
        self._refresh()
        self.solvers = {layer: self._make_solver(layer) for layer in ledger.layers}

    def _refresh(self) -> None:
        """Show the base editor the original weights where and as they are now: the model may have been moved."""
        self._aside.adapter, self._aside._edited = self.ledger.original(), {}

    def _make_solver(self, layer: int) -> Solver:
        adapter = self.ledger.adapter
        shape, place = adapter.shape(layer), algebra_device(adapter.device)

        def make() -> RidgeSolver:
            prior = self.alpha * torch.eye(shape[1], dtype=algebra_dtype(place), device=place)
            return RidgeSolver(self.storage.place(prior), shape[0], storage=self.storage)

        return SharedSolver(adapter.ranks, make, shape, True, adapter.device) if adapter.ranks.together else make()

    @torch.no_grad()
    def _work_out(self, step: Step) -> Proposal:
        self._refresh()
        watch = step.watch
        parts: list[dict[str, Tensor]] = []
        entries: list[LedgerEntry] = []
        for request in step.requests:  # each alone, so that none bears another in it
            with torch.enable_grad():
                single = self.base.propose([request], step.window, step.status)
            for phase, seconds in single.seconds.items():
                watch.seconds[phase] = watch.seconds.get(phase, 0.0) + seconds
            with watch("keys"), self.ledger.adapter.fast_products():
                parts.append(self._what_it_says(request, single.updates))
            entries += single.entries
        tensors = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
        with watch("solve"):
            trial = Trial(self.solvers)
            self._take_out(trial, step.replaced)
            self._add(trial, tensors)
        return self._proposal(trial, step.change(tensors), tuple(entries))

    def _what_it_says(self, request: EditRequest, updates: Sequence[LayerUpdate]) -> dict[str, Tensor]:
        """Return what the base editor's updates say to the inputs of their weights at all tokens of an edit."""
        prompt, target = continuation(self.tokenizer, request.text, request.target_new)
        ids = prompt + target
        view = self.ledger.preview(updates)
        line = TokenRows(view, [ids], pad_token(self.tokenizer)).line()
        found: dict[int, Tensor] = {}
        line.run(line.hidden, 0, self.ledger.layers[-1] + 1, keys=found)
        index = torch.tensor([line.index(0, position) for position in range(len(ids))], device=line.hidden.device)
        tensors = {"tokens": torch.tensor([len(ids)])}
        for update in updates:
            keys = self.ledger.adapter.ranks.same(for_algebra(found[update.layer][index]).T.contiguous())
            tensors[f"keys.{update.layer}"] = keys
            with without_autocast(keys.device):
                tensors[f"residuals.{update.layer}"] = update.delta.to(keys) @ keys
        return tensors

    def _proposal(self, trial: Trial, change: Change, entries: tuple[LedgerEntry, ...] = ()) -> Proposal:
        if self._leaves_nothing(change, entries):
            trial.clear()
        return Proposal((), self._updates(trial.deltas()), entries, trial.steps, change=change)

    def accept(self, proposal: Proposal) -> None:
        """Take the solved facts into the solvers; the base editor is never told."""
        absorb(self.solvers, proposal.pending)

    # ---- taking out and putting back ----------------------------------------------------------------------------

    def _add(self, trial: Trial, tensors: Mapping[str, Tensor], columns: Sequence[int] | None = None) -> None:
        for layer, (keys, residuals) in self._facts(tensors, columns).items():
            trial.add(layer, keys, residuals)

    def _take_out(self, trial: Trial, recorded: Sequence[RecordedFacts]) -> None:
        for record in recorded:
            for layer, (keys, residuals) in self._facts(record.tensors, record.columns).items():
                trial.take_out(layer, keys, residuals)

    def _facts(
        self, tensors: Mapping[str, Tensor], columns: Sequence[int] | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys and residuals of some edits of a record, all their tokens, by layer."""
        counts = tensors["tokens"].tolist()
        first = [sum(counts[:n]) for n in range(len(counts))]
        wanted = range(len(counts)) if columns is None else columns
        places = [place for n in wanted for place in range(first[n], first[n] + counts[n])]
        device = algebra_device(self.ledger.adapter.device)
        return {
            layer: (
                tensors[f"keys.{layer}"][:, places].to(device),
                tensors[f"residuals.{layer}"][:, places].to(device),
            )
            for layer in self.ledger.layers
        }

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal:
        """Do again what is on record; see :meth:`Editor.replay`."""
        trial = Trial(self.solvers)
        if change.restored:
            for record in old:
                self._add(trial, record.tensors, record.columns)
        else:
            self._take_out(trial, old)
        if change.tensors:
            self._add(trial, change.tensors)
        return self._proposal(trial, change, tuple(entries))

    # ---- state --------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return the settings, those of the base editor among them."""
        base = {f"base.{name}": value for name, value in self.base.settings().items()}
        return {**super().settings(), "storage.inverse": self.storage.inverse, **base}

    def opening(self) -> dict[str, Any]:
        """Return what the base editor has drawn."""
        return self.base.opening()

    def reopen(self, opening: Mapping[str, Any]) -> None:
        """Go on with what an earlier process drew."""
        self.base.reopen(opening)

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers or of another editor."""
        if "base" not in state or set(state.get("solvers", {})) != {str(layer) for layer in layers}:
            raise ArgumentError("the checkpoint was made by another editing method; use the config it was made with")
        self.base.check_state(state["base"], layers)

    def state_dict(self) -> dict[str, Any]:
        """Return the solvers' states, and the base editor's: targets that are fitted and not yet used."""
        solvers = {str(layer): solver.state_dict(copy=False) for layer, solver in self.solvers.items()}
        return {"solvers": solvers, "base": self.base.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` on a prepared editor."""
        self.base.load_state_dict(state["base"])
        for layer, solver in self.solvers.items():
            solver.load_state_dict(state["solvers"][str(layer)])
