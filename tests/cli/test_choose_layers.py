"""``lit-edit choose-layers``: candidates and halving by hand, measuring, going on, the proposal, errors."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import yaml

from lit_edit.cli.main import main
from lit_edit.console.fit_parser import FitParser
from lit_edit.data.request import DataError, EditRequest
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.editors.closed_form.rome import ROME
from lit_edit.errors import ArgumentError, UserError
from lit_edit.metrics.evaluation import evaluate_edits, measure_perplexity, summarise
from lit_edit.models import ModelAdapter
from lit_edit.runs.results import ResultsFolder
from lit_edit.stats import second_moment
from lit_edit.stats.second_moment import KeyStatistics
from lit_edit.studies.layers.bench import Bench
from lit_edit.studies.layers.candidates import check_widths, coarse_layers, groups_around, rounds_of, with_neighbours
from lit_edit.studies.layers.key_statistics import StatisticsOfAll
from lit_edit.studies.layers.sample import draw_samples
from lit_edit.studies.layers.search import Found, Plan, search_layers
from lit_edit.studies.layers.trial import Stage, Trial
from lit_edit.targets.optimize import TargetSettings
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

# ---- candidates ---------------------------------------------------------------------------------------------------


def test_candidates_by_hand() -> None:
    assert coarse_layers(30, 4) == [(0,), (4,), (8,), (12,), (16,), (20,), (24,), (28,)]
    assert [(r.step, r.edits) for r in rounds_of(8, 16)] == [(8, 2), (4, 4), (2, 8), (1, 16)]
    assert [(r.step, r.edits) for r in rounds_of(2, 1)] == [(2, 1), (1, 1), (0, 1)]
    assert with_neighbours([(0,), (3,)], 1, 4) == [(0,), (1,), (3,), (2,)]
    assert with_neighbours([(2,)], 0, 4) == [(2,)]
    assert groups_around([(0,)], [1, 2, 3], 4) == [(0, 1), (0, 1, 2)]  # what would begin below the model is left out
    assert groups_around([(2,), (3,)], [2], 4) == [(1, 2), (2, 3)]


@pytest.mark.parametrize("stride", [0, 4, 9])
def test_a_stride_the_model_is_too_small_for(stride: int) -> None:
    with pytest.raises(ArgumentError, match=f"--stride must be from 1 to 3 .*got {stride}"):
        coarse_layers(4, stride)
    with pytest.raises(ArgumentError, match=r"--stride must be 1 \(layers of the model: 1\)"):
        coarse_layers(1, 2)


def test_widths_that_the_model_has_not() -> None:
    assert check_widths([3, 1, 3], 4) == (1, 3)
    assert [check_widths(None, depth) for depth in (1, 4, 30)] == [(1,), (1, 3), (1, 3, 5)]
    with pytest.raises(ArgumentError, match=r"--widths must be from 1 to 4, .* got 1 5"):
        check_widths([1, 5], 4)


# ---- the search, with pretended trials ----------------------------------------------------------------------------


def made_up(
    score: Callable[[Stage, tuple[int, ...]], float], calls: list[tuple[Stage, tuple[int, ...], int]] | None = None
) -> Callable[[Stage, tuple[int, ...], int], Trial]:
    def measure(stage: Stage, layers: tuple[int, ...], edits: int) -> Trial:
        if calls is not None:
            calls.append((stage, layers, edits))
        return Trial(stage, layers, edits, score(stage, layers), magnitude=0.0, perplexity=10.0, perplexity_before=10.0)

    return measure


PLAN = Plan(depth=30, stride=4, widths=(1, 3), edits=12, held_out=7, default=(6, 7, 8))


def test_halving_by_hand() -> None:
    """Scores fall with the distance of the middle from layer 13, and groups are a little better."""
    calls: list[tuple[Stage, tuple[int, ...], int]] = []
    found = search_layers(
        PLAN, made_up(lambda _, layers: 1 - abs(sum(layers) / len(layers) - 13) / 30 - 0.01 / len(layers), calls)
    )
    assert calls[:8] == [("single", (layer,), 3) for layer in range(0, 29, 4)]
    # the best are 12 and 16; then 12 and 14
    assert calls[8:13] == [("single", (layer,), 6) for layer in (12, 10, 14, 16, 18)]
    assert calls[13:18] == [("single", (layer,), 12) for layer in (12, 11, 13, 14, 15)]
    groups = [(13,), (11, 12, 13), (12, 13, 14), (13, 14, 15), (10, 11, 12), (6, 7, 8)]
    assert calls[18:24] == [("group", group, 6) for group in groups]
    assert calls[24:27] == [("group", group, 12) for group in ((12, 13, 14), (13,), (11, 12, 13))]
    assert calls[27:] == [("held out", (12, 13, 14), 7), ("held out", (6, 7, 8), 7)]
    assert found.best.layers == found.proposed.layers == (12, 13, 14)


def test_what_is_proposed_is_never_worse_than_the_default_on_the_held_out_edits() -> None:
    kinds = set()
    for seed in range(40):
        draw = random.Random(seed)
        found = search_layers(PLAN, made_up(lambda *_, draw=draw: draw.choice((0.2, 0.5, 0.8))))  # type: ignore[misc]
        assert found.proposed.rank >= found.default_held_out.rank
        if found.best_held_out.score == found.default_held_out.score:
            assert found.proposed is found.default_held_out  # nobody is to change for nothing
        kinds.add(found.proposed.layers == PLAN.default)
    assert kinds == {True, False}


def test_a_method_of_one_layer_has_no_groups() -> None:
    calls: list[tuple[Stage, tuple[int, ...], int]] = []
    plan = replace(PLAN, widths=(1,), default=(8,))
    found = search_layers(plan, made_up(lambda _, layers: 1 - abs(layers[0] - 13) / 30, calls))
    assert all(len(layers) == 1 for _, layers, _ in calls)
    assert found.proposed.layers == (13,)


def test_what_breaks_the_model_does_not_win() -> None:
    good = Trial("single", (1,), 4, 0.1, magnitude=0.0, perplexity=11.0, perplexity_before=10.0)
    assert replace(good, layers=(2,), score=0.9, perplexity=16.0).rank < good.rank
    assert replace(good, score=None, error="diverges").rank < replace(good, score=0.9, perplexity=16.0).rank
    assert replace(good, perplexity=None).broken
    assert replace(good, magnitude=0.1).rank > good.rank  # decides between equal scores
    assert replace(good, perplexity=10.5).rank > good.rank


def test_a_method_that_works_nowhere() -> None:
    def fails(stage: Stage, layers: tuple[int, ...], edits: int) -> Trial:
        return Trial(stage, layers, edits, error="its target diverges")

    with pytest.raises(ArgumentError, match=r"works at none of the layers.*its target diverges"):
        search_layers(PLAN, fails)


# ---- samples ------------------------------------------------------------------------------------------------------


def test_samples_share_nothing_and_follow_the_seed() -> None:
    requests = tiny_requests()
    edits, held_out = draw_samples(requests, 3, 2, seed=1)
    assert len({r.id for r in edits + held_out}) == 5
    assert draw_samples(requests, 3, 2, seed=1) == (edits, held_out)
    assert draw_samples(requests, 3, 2, seed=2) != (edits, held_out)


def test_too_few_records() -> None:
    requests = tiny_requests()
    twin = replace(requests[0], id="twin", target_new="Athens")
    bare = EditRequest("bare", "{} is in", "Oslo", "Peru", target_true="Norway")
    with pytest.raises(DataError, match=r"--limit 4 and --held-out 3 need 7 records .* there are 6 such among 8"):
        draw_samples([*requests, twin, bare], 4, 3, seed=0)


# ---- measuring ----------------------------------------------------------------------------------------------------

TEXTS = ["The sun is in the east.", "A day has hours."]


def tiny_editor(layers: Any) -> D4S:
    return D4S(layers, contexts="plain", target=TargetSettings(steps=2))


def make_bench(tmp_path: Path, make: Callable[[Any], Any] = tiny_editor) -> Bench:
    adapter = ModelAdapter(tiny_model())
    statistics = StatisticsOfAll(cache=str(tmp_path / "stats"), every=tuple(range(adapter.n_layers)))
    return Bench(adapter, tiny_tokenizer(), make, statistics, TEXTS, window=2)


def test_a_trial_is_what_edits_do_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    bench, requests = make_bench(tmp_path), tiny_requests()[:2]
    before = {name: value.clone() for name, value in bench.adapter.model.state_dict().items()}
    trials = [bench.measure("group", layers, requests) for layers in ((1, 2), (0,), (1, 2))]
    for name, value in bench.adapter.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert replace(trials[0], seconds=0) == replace(trials[2], seconds=0)

    from lit_edit import edit

    adapter, tokenizer = ModelAdapter(tiny_model()), tiny_tokenizer()
    base = {result.id: result for result in evaluate_edits(adapter, tokenizer, requests)}
    perplexity = measure_perplexity(adapter, tokenizer, TEXTS)["mean"]
    edit(adapter.model, tokenizer, requests, tiny_editor([1, 2]), bench.statistics, window=2)
    summary = summarise(evaluate_edits(adapter, tokenizer, requests), base)
    trial = trials[0]
    assert (trial.efficacy, trial.generalization, trial.locality, trial.agreement, trial.score) == (
        summary["efficacy"]["success"],
        summary["generalization"]["success"],
        summary["locality"]["success"],
        summary["locality"]["agreement"],
        summary["score"],
    )
    assert trial.perplexity_before == perplexity
    assert trial.perplexity == measure_perplexity(adapter, tokenizer, TEXTS)["mean"] != perplexity
    assert (trial.refused, trial.edits, trial.error) == (0, 2, "")


def test_a_layer_that_the_model_has_not(tmp_path: Path) -> None:
    trial = make_bench(tmp_path).measure("single", (4,), tiny_requests()[:1])
    assert trial.broken
    assert trial.score is None
    assert "4" in trial.error


def test_methods_of_one_layer_are_known(tmp_path: Path) -> None:
    assert make_bench(tmp_path).takes_groups()
    assert make_bench(tmp_path).default_layers() == (0, 1)
    bench = make_bench(tmp_path, ROME)
    assert not bench.takes_groups()
    assert bench.default_layers() == (1,)


def test_key_statistics_of_all_layers_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, tokenizer = ModelAdapter(tiny_model()), tiny_tokenizer()
    counted: list[list[int]] = []
    count = second_moment.accumulate

    def watched(*args: Any) -> Any:
        counted.append(list(args[2]))
        return count(*args)

    monkeypatch.setattr(second_moment, "accumulate", watched)
    statistics = StatisticsOfAll.like(KeyStatistics(cache=str(tmp_path / "a"), force=True), range(4))
    found = [statistics.compute(adapter, tokenizer, layers) for layers in ([2], [0, 3])]
    assert counted == [[0, 1, 2, 3]]
    assert [list(moments) for moments in found] == [[2], [0, 3]]
    alone = KeyStatistics(cache=str(tmp_path / "b")).compute(adapter, tokenizer, [3])
    torch.testing.assert_close(found[1][3], alone[3], rtol=1e-12, atol=0)


# ---- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_goes_on(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, Trial.from_dict)
    assert folder.open({"seed": 0}) == []
    trials = [Trial("single", (1,), 3, 0.5, perplexity=float("inf")), Trial("held out", (1, 2), 7, error="it diverges")]
    for trial in trials:
        folder.append(asdict(trial))
    with folder.results.open("ab") as file:
        file.write(b'{"stage": "gro')
    kept = [replace(trials[0], perplexity=None), trials[1]]
    assert ResultsFolder(tmp_path, Trial.from_dict).open({"seed": 0}) == kept
    assert ResultsFolder(tmp_path, Trial.from_dict).open({"seed": 0}) == kept  # the torn line is gone
    with pytest.raises(ArgumentError, match=r"other settings \(seed 0, now 1\)"):
        folder.open({"seed": 1})
    with folder.results.open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"results\.jsonl:3: damaged"):
        folder.open({"seed": 0})


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    """The command, but for --out; its statistics have a folder of their own."""
    folder = tmp_path_factory.mktemp("search")
    editor = {"class_path": "lit_edit.editors.D4S", "init_args": {"contexts": "plain", "target": {"steps": 1}}}
    statistics = {"tokens": 0, "cache": str(folder / "stats")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"model": {"editor": editor, "statistics": statistics}}))
    rows = [
        {**request.as_dict(), "neighborhood": [vars(probe) for probe in request.neighborhood]}
        for request in tiny_requests()
    ]
    (folder / "facts.json").write_text(json.dumps(rows))
    words = ["choose-layers", "--model", str(tiny_folder), "--data", str(folder / "facts.json")]
    sizes = ["--edits", "2", "--held-out", "2", "--widths", "2", "--stride", "2"]
    return [*words, "--method", str(folder / "tiny.yaml"), *sizes]


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "layers"
    assert main([*command, "--out", str(out)]) == 0
    return out


def trials_in(folder: Path) -> list[Trial]:
    return [Trial.from_dict(json.loads(line)) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_proposal_can_be_run(finished: Path, tiny_folder: Path) -> None:
    parser = FitParser()
    settings = parser.parse(
        ["--config", "counterfact", "--config", str(finished / "proposal.yaml"), "--data.path", "x"]
    )
    editor = settings["model"]["editor"]
    assert settings["model"]["language_model"]["name"] == str(tiny_folder)
    assert editor["class_path"] == "lit_edit.editors.D4S"
    assert editor["init_args"]["target"]["steps"] == 1
    held_out = {trial.layers: trial for trial in trials_in(finished) if trial.stage == "held out"}
    assert (
        max(held_out.values(), key=lambda trial: trial.rank).rank == held_out[tuple(editor["init_args"]["layers"])].rank
    )
    parser.make()
    assert matplotlib.image.imread(finished / "layers.png").shape[2] == 4


def test_the_command_goes_on_and_says_what_is_proposed(
    finished: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut"
    shutil.copytree(finished, out)
    (out / "proposal.yaml").unlink()
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:9])
    assert main([*command, "--out", str(out)]) == 0
    again, whole = trials_in(out), trials_in(finished)
    assert again[:-1] == whole[:-1]
    assert replace(again[-1], seconds=0) == replace(whole[-1], seconds=0)
    assert yaml.safe_load((out / "proposal.yaml").read_text()) == yaml.safe_load(
        (finished / "proposal.yaml").read_text()
    )
    shown = capsys.readouterr().out
    assert "Layers, best first" in shown
    assert "proposed" in shown
    assert f"--config {out / 'proposal.yaml'}" in shown
    assert main([*command, "--out", str(out), "--seed", "1"]) == 2
    assert "seed 0, now 1" in capsys.readouterr().err


def test_methods_without_layers_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--method", "method/grace"]) == 2
    assert "GRACE has no setting 'layers' to choose" in capsys.readouterr().err


def test_found_says_so_when_the_default_is_not_beaten() -> None:
    from lit_edit.studies.layers.proposal import proposal_text, verdict

    best = Trial("held out", (3,), 5, 0.5, 1.0, 0.5, 0.25, 0.1, 0.75, 12.0, 10.0)
    default = replace(best, layers=(1, 2), score=0.6)
    found = Found(replace(best, stage="single"), best, default)
    assert "default is proposed" in verdict(found)
    text = proposal_text(found, "some/model", {"class_path": "A", "init_args": {"layers": [9]}}, ["How."])
    assert yaml.safe_load(text)["model"]["editor"]["init_args"]["layers"] == [1, 2]
    more = {"model": {"editor": {"class_path": "B"}, "statistics": {"tokens": 0}}, "data": {"target_window": 3}}
    whole = yaml.safe_load(
        proposal_text(found, "some/model", {"class_path": "A", "init_args": {"layers": [9]}}, [], more)
    )
    assert whole["model"].pop("editor") == yaml.safe_load(text)["model"]["editor"]
    assert whole == {  # what else the trials were made with
        "model": {"language_model": {"name": "some/model"}, "statistics": {"tokens": 0}},
        "data": {"target_window": 3},
    }
    assert "#   1-2 (default, proposed)  0.600  1.000" in text
    assert "#   3                        0.500  1.000     0.500           0.250     0.750      12.00" in text
