"""How many tokens an edit runs: counted from the edits themselves, or what they have on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_edit.data.request import EditRequest
from lit_edit.targets.optimize import TargetSettings
from lit_edit.targets.problem import TargetProblem, build_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = "The people of this small town had always been proud. {}"
"""Stands for a sampled context, which is as long."""


@dataclass(frozen=True)
class Workload:
    """Tokens of one edit, on average over a window."""

    rows: float  # prompts in all contexts, and the row of the KL term
    own: float  # from the lookup token on, over all rows: what every step runs
    shared: float  # distinct ones before the lookup tokens: run once for a window
    keys: float  # distinct ones up to the lookup tokens: run once for the keys
    read: float  # states that the head reads in a step
    steps: float  # passes of the target optimisation
    counted: bool = False  # from the edits of the config; otherwise averages of CounterFact

    @classmethod
    def typical(cls, contexts: int, target: TargetSettings) -> Workload:
        """Return what edits of CounterFact have on average (the tokens of SmolLM2; others have fewer).

        ``contexts`` are sampled ones, beside the plain prompt.

        Example:
            >>> Workload.typical(5, TargetSettings()).rows
            7.0
        """
        prompts = contexts + 1
        return cls(
            rows=prompts + 1.0,
            own=prompts * _AFTER + 1.0,
            shared=prompts * _BEFORE,
            keys=prompts * (_BEFORE + 1.0) + contexts * _LENGTH,
            read=prompts * _TARGET + 1.0,
            steps=expected_steps(target),
        )

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        contexts: int,
        target: TargetSettings,
    ) -> Workload:
        """Count the tokens of the edits of a window; ``contexts`` as for :meth:`typical`.

        Example:
            >>> from lit_edit.testing import tiny_requests, tiny_tokenizer
            >>> Workload.of(tiny_tokenizer(), tiny_requests(), 0, TargetSettings()).rows
            2.0
        """
        # Contexts differ in their first words, and so in all that follows.
        texts = tuple(_CONTEXT.replace("The", start, 1) for start in ("The", "So", "As", "I", "You")[:contexts])
        templates = (("{}",), texts) if texts else (("{}",),)
        problems = [build_problem(tokenizer, request, templates) for request in requests]
        count = len(problems)
        before = {row[: i + 1] for p in problems for row, lookup in _rows(p) for i in range(lookup)}
        upto = [{p.ids[: i + 1] for p in problem.prompts for i in range(p.lookup + 1)} for problem in problems]
        return cls(
            rows=sum(len(_rows(p)) for p in problems) / count,
            own=sum(len(row) - lookup for p in problems for row, lookup in _rows(p)) / count,
            shared=len(before) / count,
            keys=sum(map(len, upto)) / count,
            read=sum(len(p.prompts) * len(p.target) + 1 for p in problems) / count,
            steps=expected_steps(target),
            counted=True,
        )


# Of CounterFact in tokens of SmolLM2: from the lookup token on, before it (behind the context), target, and context.
_AFTER, _BEFORE, _TARGET, _LENGTH = 4.2, 4.5, 1.1, 10.0


def expected_steps(target: TargetSettings) -> float:
    """Return how many passes a target takes: as measured on SmolLM2 where it stops early, else all that are allowed.

    Example:
        >>> expected_steps(TargetSettings(steps=25)), expected_steps(TargetSettings(steps=25, rule="polyak"))
        (25.0, 7.5)
    """
    if target.rule == "polyak":
        return max(1.0, 0.3 * target.steps)
    return max(1.0, 0.67 * target.steps) if target.probability > 0 or target.margin > 0 else float(target.steps)


def _rows(problem: TargetProblem) -> list[tuple[tuple[int, ...], int]]:
    """Return the rows of an edit with their lookup tokens, as the target optimisation runs them."""
    rows = [(p.ids + problem.target[:-1], p.lookup) for p in problem.prompts]
    return [*rows, (problem.essence.ids, problem.essence.lookup)]
