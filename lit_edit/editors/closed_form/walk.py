"""One walk up the edited layers: keys are read, residuals shared out, and each layer is rewritten before the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_edit.devices.algebra import for_algebra
from lit_edit.editors.base import Stopwatch
from lit_edit.editors.closed_form.facts import Facts
from lit_edit.editors.closed_form.key_rows import KeyLine
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.shared import Solver
from lit_edit.targets.contexts import Templates, group_weights

ResidualMode = Literal["shared", "remeasured", "uniform", "root", "ends"]

Solve = Callable[[int, Tensor, Tensor], Tensor]
"""From a layer, keys ``(d_in, n)`` and residuals ``(d_out, n)`` to the update ``(d_out, d_in)`` to go on with."""


Measured = Literal["state", "mlp"]

Adjust = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a layer, keys and keys at the plain prompts ``(d_in, n)``, and what is missing at those ``(d_out, n)``, to the
residuals that the layer's solution is to say to the keys."""


@dataclass(frozen=True)
class Walk:
    """How keys and residuals of a step are found, on the model as it is before the step (``reference``).

    Args:
        residual: How the residual is spread over the layers (:class:`lit_edit.editors.ClosedFormEditor`).
        templates: The contexts, whose keys are averaged.
        measured: What targets are targets of: the ``state`` behind the last edited layer, or the output of its ``mlp``.
    """

    ledger: EditLedger
    reference: ModelAdapter
    residual: ResidualMode
    templates: Templates
    watch: Stopwatch
    measured: Measured = "state"

    @torch.no_grad()
    def facts(
        self, rows: KeyLine, targets: Tensor, shifts: Tensor, solve: Solve, adjust: Adjust | None = None
    ) -> Facts:
        """Walk up the layers.

        Args:
            rows: The prompts at the input of the first edited layer.
            targets: ``(d_model, n)``, the wanted states behind the last edited layer.
            shifts: ``(d_model, n)``, what is missing to them on the reference model.
            solve: What to write into a layer before the next one is read.
            adjust: What a method makes of the residuals.
        """
        layers, hidden = self.ledger.layers, rows.hidden
        keys, residuals = {}, {}
        missing = shifts.to(hidden.device)
        for index, layer in enumerate(layers):
            with self.watch("keys"):
                after, inputs = self._run(rows, layer, hidden)
                keys[layer] = self._mean_key(rows, inputs)
                if self.residual in ("remeasured", "root", "ends") and index > 0:
                    if self.measured == "mlp":
                        reached = self._reached_mlp(rows, inputs, after, layer)
                    else:
                        reached = self._reached_state(rows, after, layer)
                    missing = targets.to(hidden.device) - reached.to(missing)
            with self.watch("solve"):
                plain_inputs = inputs[rows.lookups[:, 0]]
                share = for_algebra(missing) / self._share(index)
                residuals[layer] = share
                if self.measured == "state":
                    residuals[layer] = self.reference.to_weight_residual(layer, plain_inputs, share)
                if adjust is not None:
                    residuals[layer] = adjust(layer, keys[layer], for_algebra(plain_inputs).T, residuals[layer])
                delta = solve(layer, keys[layer], residuals[layer])
            if layer != layers[-1]:
                with self.watch("keys"):
                    weight = self.ledger.edited_weight(layer, delta)
                    hidden = self._rewritten(layer, weight, hidden, after, inputs, rows)
        return Facts(keys, residuals, targets, shifts, (targets.shape[1],))

    def _reached_state(self, rows: KeyLine, after: Tensor, layer: int) -> Tensor:
        """Return ``(d_model, n)``, the states behind the last edited layer, from the output of a lower one."""
        plain = rows.line.carry(after, rows.plain)
        states = rows.plain.run(plain, layer + 1, self.ledger.layers[-1] + 1, adapter=self.reference)
        return states[rows.plain_lookups].T

    def _reached_mlp(self, rows: KeyLine, inputs: Tensor, after: Tensor, layer: int) -> Tensor:
        """Return ``(d_out, n)``, what the last edited layer's down projection says.

        ``inputs`` are ``(tokens, d_in)``, a down projection's, and ``after`` ``(tokens, d_model)`` its layer's output.
        """
        last = self.ledger.layers[-1]
        if layer == last:
            keys = inputs[rows.lookups[:, 0]]
        else:
            found: dict[int, Tensor] = {}
            plain = rows.line.carry(after, rows.plain)
            rows.plain.run(plain, layer + 1, last + 1, keys=found, adapter=self.reference)
            keys = found[last][rows.plain_lookups]
        return self.reference.project(last, keys).T

    @torch.no_grad()
    def reached(self, rows: KeyLine) -> Tensor:
        """Return the states ``(d_model, n)`` behind the last edited layer at the plain prompts' lookup tokens."""
        layers = self.ledger.layers
        plain = rows.line.carry(rows.hidden, rows.plain)
        states = rows.plain.run(plain, layers[0], layers[-1] + 1, adapter=self.reference)
        return states[rows.plain_lookups].T

    def _share(self, index: int) -> float:
        """Return the number that what is missing is divided by at a layer, counted from the lowest edited one."""
        count = len(self.ledger.layers)
        if self.residual == "uniform":
            return count
        if self.residual == "ends":
            return 1 if index == count - 1 else 2 if index == 0 else math.inf
        return (count - index) ** 0.5 if self.residual == "root" else count - index

    @torch.no_grad()
    def first_keys(self, rows: KeyLine) -> Tensor:
        """Return the keys ``(d_in, n)`` at the first edited layer, which no edit can change."""
        return self._mean_key(rows, self._run(rows, self.ledger.layers[0], rows.hidden)[1])

    def _run(self, rows: KeyLine, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run a layer; return its output and the inputs of its down projection ``(tokens, d_in)``."""
        found: dict[int, Tensor] = {}
        after = rows.line.run(hidden, layer, layer + 1, keys=found, adapter=self.reference)
        return after, found[layer]

    def _mean_key(self, rows: KeyLine, inputs: Tensor) -> Tensor:
        found = for_algebra(inputs[rows.lookups])
        weights = torch.tensor(group_weights(self.templates), dtype=found.dtype, device=found.device)
        keys = torch.einsum("ncd,c->dn", found, weights)
        return self.ledger.adapter.ranks.same(keys.contiguous())  # edits are told apart by them, on every rank alike

    def _rewritten(
        self, layer: int, weight: Tensor, hidden: Tensor, after: Tensor, inputs: Tensor, rows: KeyLine
    ) -> Tensor:
        """Return a layer's output once its down projection has another weight, in the layer's layout.

        The layer was given ``hidden`` ``(tokens, d_model)``, its down projection ``inputs`` ``(tokens, d_in)``, and the
        output was ``after``.
        """
        if not self.reference.adds_up:  # what is projected does not simply add to the stream
            view = self.reference.with_weights({self.ledger.names[layer]: weight})
            return rows.line.run(hidden, layer, layer + 1, adapter=view)
        change = self.reference.to_layout(layer, weight - self.reference.weight(layer))  # (d_out, d_in)
        return after + inputs @ change.T


def alone(solvers: Mapping[int, Solver]) -> Solve:
    """Return a rule that goes on as if this one edit were the only one ever made: what it finds depends on no other."""

    def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        projected, scale = solvers[layer].alone(keys)
        return (residuals.to(projected) / scale) @ projected.T

    return solve


def as_columns(vectors: Sequence[Tensor]) -> Tensor:
    """Return vectors ``(d,)`` as the columns of a matrix ``(d, n)``."""
    return torch.stack(list(vectors), 1)
