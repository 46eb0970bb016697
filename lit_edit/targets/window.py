"""The rows of the edits whose targets are fitted together: what never changes, and what is run at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import Line, TokenRows
from lit_edit.targets.problem import TargetProblem

_CHUNK_TOKENS = 768
"""Tokens run forward and backward at a time: enough to keep matrix products busy, few enough to bound memory."""


@dataclass
class Chunk:
    """Rows of some edits, run together from their lookup tokens on.

    Attributes:
        hidden: ``(tokens, d_model)``, the unchanged states entering the first layer to run: the one above the highest
            edited one, or that one itself where its modules are moved.
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
        self,
        adapter: ModelAdapter,
        problems: Sequence[TargetProblem],
        layer: int,
        stop: int,
        pad: int,
        modules: bool = False,
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
        entering = everything.run(everything.hidden, 0, layer)
        states = everything.run(entering, layer, layer + 1, keys=found)
        self.hidden = _by_node(everything, states)
        self.entering = _by_node(everything, entering) if modules else None
        plain = [everything.index(own[0], lookups[own[0]]) for own in self.rows_of]
        self.down_inputs = found[layer][torch.tensor(plain, device=states.device)]
        # What comes before the lookup tokens never changes: its attention keys and values are computed once.
        self.before = self.rows.line(stops=lookups) if any(lookups) else None
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        if self.before is not None:
            first, start = self._start
            self.before.run(start[self.before.nodes], first, stop, keep=self.kept)

    @property
    def _start(self) -> tuple[int, Tensor]:
        """The first layer that is run at every step, and the states that enter it, by node."""
        return (self.layer + 1, self.hidden) if self.entering is None else (self.layer, self.entering)

    def run(self, chunk: Chunk, delta: Tensor) -> Tensor:
        """Run a chunk with the vectors of its edits added, up to the layer that is read.

        They are ``(edits, d_model)`` of all edits, or ``(edits, 2 d_model)``: of the MLP's and the attention's output.
        """
        vectors = delta[chunk.owner].to(chunk.hidden.dtype)
        if self.entering is None:
            hidden = chunk.hidden.index_add(0, chunk.moved, vectors)
        elif self.adapter.spec.family == "gptj":  # both modules read the layer's input: what they say is added up
            hidden = chunk.line.run(chunk.hidden, self.layer, self.layer + 1, self.kept, adapter=self.adapter)
            hidden = hidden.index_add(0, chunk.moved, vectors.view(len(vectors), 2, -1).sum(1))
        else:
            with self._moved_modules(chunk, vectors.chunk(2, 1)):
                hidden = chunk.line.run(chunk.hidden, self.layer, self.layer + 1, self.kept, adapter=self.adapter)
        return chunk.line.run(hidden, self.layer + 1, self.stop, self.kept, adapter=self.adapter)

    @contextmanager
    def _moved_modules(self, chunk: Chunk, vectors: Sequence[Tensor]) -> Iterator[None]:
        """Add vectors to the outputs of the layer's MLP and attention, inside this context."""
        if not self.adapter.packs:
            raise ArgumentError(
                f"the modules of a {self.adapter.spec.family!r} layer cannot be moved one by one: its attention does "
                "not go through transformers' interface"
            )

        def add(values: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                own = output[0] if isinstance(output, tuple) else output
                moved = own.reshape(-1, own.shape[-1]).index_add(0, chunk.moved, values).view_as(own)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            return hook

        places = (self.adapter.down_proj(self.layer), self.adapter.attention_module(self.layer))
        hooks = [place.register_forward_hook(add(values)) for place, values in zip(places, vectors, strict=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def base(self) -> Tensor:
        """Return ``h0`` ``(edits, d_model)``: the states at the lookup tokens of the plain prompts."""
        states = self.hidden[self._plain_lookups()]
        return states if states.dtype == torch.float64 else states.float()

    def module_bases(self) -> Tensor:
        """Return ``(edits, 2 d_model)``: what MLP and attention add to the stream at the plain lookup tokens."""
        assert self.entering is not None  # noqa: S101 - for the type checker
        mlp, places = self.mlp_base(), self._plain_lookups()
        both = (self.hidden[places] - self.entering[places]).to(mlp)
        return torch.cat([mlp, both - mlp], 1)

    @torch.no_grad()
    def mlp_base(self) -> Tensor:
        """Return ``v0`` ``(edits, d_model)``: what the MLP adds to the stream at the plain prompts' lookup tokens."""
        values = self.adapter.mlp_output(self.layer, self.down_inputs)
        return values if values.dtype == torch.float64 else values.float()

    def _plain_lookups(self) -> Tensor:
        nodes = [self.rows.paths[rows[0]][self.lookups[rows[0]]] for rows in self.rows_of]
        return torch.tensor(nodes, device=self.hidden.device)

    def chunks(self, edits: Sequence[int], plain: Collection[int] = ()) -> list[Chunk]:
        """Cut the rows of some edits into chunks of about ``_CHUNK_TOKENS`` tokens, and return this rank's share.

        Of ``plain`` ones only the plain prompts are seen.
        """
        rows_of: dict[int, Sequence[int]] = {edit: self.rows_of[edit] for edit in edits}
        rows_of |= {edit: (rows[0], rows[-1]) for edit, rows in rows_of.items() if edit in plain}
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
        return Chunk(line, self._start[1][line.nodes], edits, **tensors, counts=counts)


def _by_node(line: Line, values: Tensor) -> Tensor:
    """Return values ``(tokens, ...)`` of a line that has all nodes, by node."""
    return torch.empty_like(values).index_copy_(0, line.nodes, values)
