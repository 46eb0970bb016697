"""The rows of the edits whose targets are fitted together: what never changes, and what is run at every step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import Line, TokenRows
from lit_edit.models.shards import whole
from lit_edit.targets.problem import TargetProblem

_CHUNK_TOKENS = 768
"""Tokens run forward and backward at a time: enough to keep matrix products busy, few enough to bound memory."""


@dataclass
class Chunk:
    """Rows of some edits, run together from their lookup tokens on.

    Attributes:
        line: The tokens.
        hidden: ``(tokens, d_model)``, the unchanged states entering the first layer to run.
        edits: Which edits.
        moved: ``(rows,)``, where in the line the lookup tokens are.
        owner: ``(rows,)``, the edit of each of those.
        read: ``(target tokens,)``, where the states that predict target tokens are.
        wanted: ``(target tokens,)``, the target tokens themselves.
        row: ``(target tokens,)``, the prompt (counted within the chunk) that each of those belongs to.
        row_owner: ``(prompts,)``, the edit of each prompt.
        lengths: ``(prompts,)``, target tokens of each.
        essence: ``(edits,)``, where the KL terms' states are.
        counts: Whether its losses count; otherwise it is run for company (:meth:`Ranks.deal`).
    """

    line: Line
    hidden: Tensor
    edits: Tensor
    moved: Tensor
    owner: Tensor
    read: Tensor
    wanted: Tensor
    row: Tensor
    row_owner: Tensor
    lengths: Tensor
    essence: Tensor
    counts: bool = True


class Window:
    """The rows of all edits of a window: the unchanged model's states, and chunks of what is to be run again."""

    @torch.no_grad()
    def __init__(
        self, adapter: ModelAdapter, problems: Sequence[TargetProblem], layer: int, stop: int, pad: int
    ) -> None:
        self.adapter, self.problems, self.layer, self.stop = adapter, problems, layer, stop
        rows: list[tuple[int, ...]] = []
        lookups: list[int] = []
        self.rows_of: list[range] = []  # per edit: its prompts and, last, the row of the KL term
        for problem in problems:
            self.rows_of.append(range(len(rows), len(rows) + len(problem.prompts) + 1))
            rows += [prompt.ids + problem.target[:-1] for prompt in problem.prompts] + [problem.essence.ids]
            lookups += [prompt.lookup for prompt in problem.prompts] + [problem.essence.lookup]
        # From the lookup token on each row is its own: its edit moves it.
        self.rows, self.lookups = TokenRows(adapter, rows, pad, share=lookups), lookups
        self.lengths = [len(row) for row in rows]
        everything = self.rows.line()
        found: dict[int, Tensor] = {}
        states = everything.run(everything.run(everything.hidden, 0, layer), layer, layer + 1, keys=found)
        self.hidden = torch.empty_like(states)
        self.hidden[everything.nodes] = states  # by node
        self.down_inputs = torch.empty_like(found[layer])
        self.down_inputs[everything.nodes] = found[layer]
        # What comes before the lookup tokens never changes: its attention keys and values are computed once.
        self.before = self.rows.line(stops=lookups) if any(lookups) else None
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        if self.before is not None:
            self.before.run(self.hidden[self.before.nodes], layer + 1, stop, keep=self.kept)

    def base(self) -> Tensor:
        """Return ``h0`` ``(edits, d_model)``: the states at the lookup tokens of the plain prompts."""
        states = self.hidden[self._plain_lookups()]
        return states if states.dtype == torch.float64 else states.float()

    @torch.no_grad()
    def mlp_base(self) -> Tensor:
        """Return ``v0`` ``(edits, d_out)``: the down projection's outputs at the lookup tokens of the plain prompts."""
        module = self.adapter.down_proj(self.layer)
        weight = self.adapter.to_layout(self.layer, self.adapter.weight(self.layer))
        values = torch.nn.functional.linear(self.down_inputs[self._plain_lookups()], weight)
        if isinstance(module.bias, Tensor):
            values = values + whole(module.bias)
        return values if values.dtype == torch.float64 else values.float()

    def _plain_lookups(self) -> Tensor:
        nodes = [self.rows.paths[rows[0]][self.lookups[rows[0]]] for rows in self.rows_of]
        return torch.tensor(nodes, device=self.hidden.device)

    def chunks(self, edits: Sequence[int], plain: Collection[int] = ()) -> list[Chunk]:
        """Cut the rows of some edits into chunks of about ``_CHUNK_TOKENS`` tokens, and return this rank's share.

        Args:
            edits: Which edits.
            plain: Those of them that are to be seen at their plain prompts only.
        """
        rows_of = {edit: self._rows(edit, edit in plain) for edit in edits}
        sizes = {edit: sum(self.lengths[r] - self.lookups[r] for r in rows) for edit, rows in rows_of.items()}
        total, ranks = sum(sizes.values()), self.adapter.ranks
        wanted = max(1, math.ceil(total / _CHUNK_TOKENS))
        wanted = math.ceil(wanted / ranks.size) * ranks.size  # every rank equally many, if there are edits enough
        limit = total / wanted  # chunks of about equal size
        groups: list[list[int]] = []
        size = limit
        for edit in edits:
            if size >= limit:
                groups.append([])
                size = 0.0
            groups[-1].append(edit)
            size += sizes[edit]
        return [self._chunk({e: rows_of[e] for e in group}, counts) for group, counts in ranks.deal(groups)]

    def _rows(self, edit: int, plain: bool) -> list[int]:
        """Return the rows of an edit; the last one is that of the KL term."""
        rows = self.rows_of[edit]
        return [rows[0], rows[-1]] if plain else list(rows)

    def _chunk(self, rows_of: Mapping[int, Sequence[int]], counts: bool = True) -> Chunk:
        rows = [row for group in rows_of.values() for row in group]
        line = self.rows.line(rows, [self.lookups[r] for r in rows], [self.lengths[r] for r in rows], self.before)
        found: dict[str, list[int]] = {name: [] for name in
            ("moved", "owner", "read", "wanted", "row", "row_owner", "lengths", "essence")}  # fmt: skip
        for edit, (*prompts, essence) in rows_of.items():
            target = self.problems[edit].target
            found["moved"] += [line.index(row, self.lookups[row]) for row in (*prompts, essence)]
            found["owner"] += [edit] * (len(prompts) + 1)
            found["essence"].append(line.index(essence, self.lookups[essence]))
            for row in prompts:
                last = self.lengths[row]
                found["read"] += [line.index(row, position) for position in range(last - len(target), last)]
                found["wanted"] += target
                found["row"] += [len(found["row_owner"])] * len(target)
                found["row_owner"].append(edit)
                found["lengths"].append(len(target))
        device = self.hidden.device
        tensors = {name: torch.tensor(values, device=device) for name, values in found.items()}
        edits = torch.tensor(list(rows_of), device=device)
        return Chunk(line, self.hidden[line.nodes], edits, **tensors, counts=counts)
