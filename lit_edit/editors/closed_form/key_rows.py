"""The rows at which keys are read: prompts cut behind their lookup tokens, run up to the first edited layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import Line, TokenRows
from lit_edit.targets.problem import TargetProblem


@dataclass(frozen=True)
class KeyLine:
    """The rows of some edits, ready to walk up the edited layers.

    Attributes:
        line: All prompts of all edits.
        hidden: ``(tokens, d_model)``, the input of the first edited layer.
        lookups: ``(edits, contexts)``, where in the line the lookup tokens stand.
        plain: The plain prompts alone.
        plain_lookups: ``(edits,)``, the lookup tokens in :attr:`plain`.
    """

    line: Line
    hidden: Tensor
    lookups: Tensor
    plain: Line
    plain_lookups: Tensor


class KeyRows:
    """Prompts of a window of edits, by what each is :func:`asked`, at the input of the first edited layer.

    No edit can change that: the layers below the first edited one are the same in every view of the model.
    """

    @torch.no_grad()
    def __init__(self, adapter: ModelAdapter, problems: Mapping[str, TargetProblem], layer: int, pad: int) -> None:
        prompts = [prompt for problem in problems.values() for prompt in problem.prompts]
        self._lookups = [prompt.lookup for prompt in prompts]
        self._rows_of: dict[str, range] = {}
        first = 0
        for name, problem in problems.items():
            self._rows_of[name] = range(first, first + len(problem.prompts))
            first += len(problem.prompts)
        self._rows = TokenRows(adapter, [prompt.ids[: prompt.lookup + 1] for prompt in prompts], pad)
        line = self._rows.line()
        states = line.run(line.hidden, 0, layer)
        self._states = torch.empty_like(states)
        self._states[line.nodes] = states

    def holds(self, ids: Sequence[str]) -> bool:
        """Tell whether these edits are among the window's."""
        return all(name in self._rows_of for name in ids)

    def of(self, ids: Sequence[str]) -> KeyLine:
        """Return the rows of some edits."""
        rows = [self._rows_of[name] for name in ids]
        line = self._rows.line([row for group in rows for row in group])
        plain = self._rows.line([group[0] for group in rows])
        at = [[line.index(row, self._lookups[row]) for row in group] for group in rows]
        plain_at = [plain.index(group[0], self._lookups[group[0]]) for group in rows]
        device = self._states.device
        return KeyLine(
            line,
            self._states[line.nodes],
            torch.tensor(at, device=device),
            plain,
            torch.tensor(plain_at, device=device),
        )
