"""Targets fitted by ranks, each a part of the edits: those of one process, the same bits on all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lit_edit.devices.ranks import Ranks
from lit_edit.models.adapter import ModelAdapter
from lit_edit.targets import window as window_module
from lit_edit.targets.losses import TargetLoss
from lit_edit.targets.optimize import DivergedError, TargetSettings, optimise_targets
from lit_edit.targets.problem import TargetProblem
from lit_edit.targets.window import Window
from lit_edit.testing import tiny_model
from tests.ranks.together import Found, together
from tests.targets.test_optimize import LAYER, varied

SIZES = [2, 3]
SETTINGS = {
    "adam": TargetSettings(steps=6),
    "polyak": TargetSettings(steps=6, rule="polyak"),
    "stop": TargetSettings(steps=16, probability=0.1),
    "plain first": TargetSettings(steps=16, rule="polyak", probability=0.05, plain_first=True),
    "margin": TargetSettings(steps=12, margin=0.1, plain_first=True),
    "early loss": TargetSettings(steps=4, loss_layer=2, clamp=0.2),
    "one pass": TargetSettings(steps=1),
}
IN_LOCKSTEP = ("adam", "plain first")
COUNTS = [1, 2, 5]
HOWS: list[dict[str, bool]] = [{}, {"lockstep": True}, {"lockstep": True, "alike": True}]
PARTS = ("delta", "base")


def adapter_of(family: str, ranks: Ranks, **how: bool) -> ModelAdapter:
    adapter = ModelAdapter(tiny_model(family, initializer_range=0.3), products="torch")
    adapter.ranks = replace(ranks, **how)
    return adapter


def some(count: int) -> tuple[TargetProblem, ...]:
    """Problems that stop early, or late, or never."""
    return varied()[1 : 1 + count] if count < 5 else varied()


def fit(ranks: Ranks, family: str) -> Found:
    window_module._CHUNK_TOKENS = 30  # several chunks a rank
    found: Found = {}
    for how in HOWS if ranks.together else HOWS[:1]:
        adapter = adapter_of(family, ranks, **how)
        passes: list[int] = []
        adapter.layers[3].register_forward_pre_hook(lambda *args, passes=passes: passes.append(1))
        for name, settings in SETTINGS.items():
            for count in COUNTS if name in IN_LOCKSTEP or not how else ():
                passes.clear()
                seen: list[tuple[int, int]] = []
                problems = some(count)
                targets = optimise_targets(
                    adapter, problems, LAYER, settings, progress=lambda *step, seen=seen: seen.append(step)
                )
                case = f"{how} {name} {count}"
                for part in PARTS:
                    found[f"{case} {part}"] = torch.stack([getattr(target, part) for target in targets])
                found[f"{case} traces"] = [list(map(list, target.trace)) for target in targets]
                found[f"{case} probabilities"] = [[t.probability_before, t.probability] for t in targets]
                found[f"{case} seen"], found[f"{case} passes"] = seen, sum(passes)
    return found


@pytest.fixture(scope="module", params=["llama", pytest.param("gptj", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(family: str) -> Found:
    return together(1, fit, family)[0]


@pytest.fixture(scope="module", params=SIZES)
def everyone(request: pytest.FixtureRequest, family: str) -> list[Found]:
    return together(request.param, fit, family)


def test_targets_are_those_of_one_process(everyone: list[Found], alone: Found) -> None:
    for how in HOWS:
        for name in IN_LOCKSTEP if how else SETTINGS:
            for count in COUNTS:
                case, one = f"{how} {name} {count}", f"{{}} {name} {count}"
                for rank, found in enumerate(everyone):
                    lengths = [len(trace) for trace in found[f"{case} traces"]]
                    assert lengths == [len(trace) for trace in alone[f"{one} traces"]], (rank, case)
                    assert found[f"{case} seen"] == alone[f"{one} seen"]
                    for part in PARTS:
                        expected = alone[f"{one} {part}"]
                        error = (found[f"{case} {part}"] - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-9)
                        assert float(error.max()) < 1e-4, (rank, case, part)
                    for mine, theirs in zip(found[f"{case} traces"], alone[f"{one} traces"], strict=True):
                        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)
                    mine, theirs = (torch.tensor(f[f"{c} probabilities"]) for f, c in ((found, case), (alone, one)))
                    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-7)
    assert any(len(set(map(len, alone[f"{{}} {name} 5 traces"]))) > 1 for name in ("stop", "plain first", "margin"))


def test_all_ranks_have_the_same_bits(everyone: list[Found]) -> None:
    leader = everyone[0]
    for found in everyone[1:]:
        for name, value in leader.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[name], value), name
            elif not name.endswith("passes"):
                assert found[name] == value, name


def test_the_passes_are_shared(everyone: list[Found], alone: Found) -> None:
    """Those of five edits; a single edit is one rank's, and in lockstep all run equally often."""
    size = len(everyone)
    passes = {how: [found[f"{HOWS[how]} adam 5 passes"] for found in everyone] for how in range(3)}
    assert len(set(passes[0])) <= 2
    # What is not shared: one pass over the window, and one over what comes before the lookup tokens.
    assert max(passes[0]) < 0.75 * alone["{} adam 5 passes"] + size
    assert len(set(passes[1])) == len(set(passes[2])) == 1
    assert passes[2][0] > passes[1][0]  # alike: everyone runs everything
    single = [found["{} adam 1 passes"] for found in everyone]
    assert single[0] > single[1] == single[-1]
    assert len({found[f"{HOWS[1]} adam 1 passes"] for found in everyone}) == 1


# ---- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_each_edit_counts_in_one_chunk_of_one_rank(
    how: dict[str, bool], count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a group: only what each rank would run is looked at."""
    monkeypatch.setattr(window_module, "_CHUNK_TOKENS", 30)
    adapter = adapter_of("gpt2", Ranks())
    window = Window(adapter, some(count), LAYER, 4, 0)
    chunks = []
    for rank in range(size):
        adapter.ranks = Ranks(rank, size, **how)
        chunks.append(window.chunks(range(count)))
    counted = [edit for own in chunks for chunk in own if chunk.counts for edit in chunk.edits.tolist()]
    assert sorted(counted) == list(range(count))
    assert any(chunk.counts for chunk in chunks[0])  # rank 0 tells the others how large the vocabulary is
    if how:
        assert len({len(own) for own in chunks}) == 1
    elif count >= size:
        assert all(chunks)  # nobody idles while there are edits enough


# ---- diverging -------------------------------------------------------------------------------------------------------


def diverge(ranks: Ranks, bad: int, at: int) -> Found:
    """Let one edit leave the finite numbers at some step, on the rank that runs it."""
    adapter, runs, ran = adapter_of("gpt2", ranks), [0], []
    add, call = TargetLoss._add, TargetLoss.__call__

    def counting(self: TargetLoss, *args: Any, **options: Any) -> Any:
        runs[0] += 1
        return call(self, *args, **options)

    def spoiling(self: TargetLoss, chunk: Any, delta: Any, contexts: Any, with_gradient: bool, losses: Any) -> None:
        add(self, chunk, delta, contexts, with_gradient, losses)
        if bad in chunk.edits.tolist() and runs[0] == at + 1:
            ran.append(ranks.rank)
            losses.nll[bad] = float("nan")

    TargetLoss._add, TargetLoss.__call__ = spoiling, counting
    try:
        optimise_targets(adapter, some(5), LAYER, TargetSettings(steps=6))
    except DivergedError as error:
        return {"error": [str(error), error.index, error.step], "ran": ran, "after": ranks.gather(ranks.rank)}
    return {"error": None}


@pytest.mark.parametrize(("size", "bad", "at"), [(2, 0, 0), (2, 4, 2), (3, 3, 1)])
def test_a_target_that_diverges_does_so_on_all_ranks(size: int, bad: int, at: int) -> None:
    everyone = together(size, diverge, bad, at)
    for found in everyone:
        assert found["error"] == everyone[0]["error"]
        assert found["error"][1:] == [bad, at]
        assert found["after"] == list(range(size))
    assert sum(len(found["ran"]) for found in everyone) == 1


def huge(ranks: Ranks) -> Found:
    settings = TargetSettings(steps=4, lr=1e30, clamp=float("inf"))
    try:
        optimise_targets(adapter_of("llama", ranks), some(5), LAYER, settings)
    except DivergedError as error:
        return {"error": [str(error), error.index, error.step]}
    return {"error": None}


@pytest.mark.parametrize("size", SIZES)
def test_steps_too_long_are_the_same_error_everywhere(size: int) -> None:
    (alone,) = together(1, huge)
    assert alone["error"] is not None
    assert together(size, huge) == [alone] * size
