"""``lit-edit eval-harness`` with a stand-in for lm-eval; the real one is not among the test dependencies."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lit_edit.cli.eval_harness import plain_results, result_rows
from lit_edit.cli.main import main


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's names, recording what it is asked; its accuracy is 1 where the model's weight is 0, else 0.5."""
    seen = SimpleNamespace(asked=[], failure=None)

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            self.include_path = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in ("sst2", "mmlu")]

    def simple_evaluate(**asked: Any) -> dict[str, Any]:
        if seen.failure is not None:
            raise seen.failure
        seen.asked.append(asked)
        accuracy = 1.0 if asked["model"].model.weight == 0 else 0.5
        tasks = {task: {"alias": task, "acc,none": accuracy, "acc_stderr,none": 0.1} for task in asked["tasks"]}
        return {"results": tasks, "samples": object()}

    package, models, hf, tasks = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    parts: Any = SimpleNamespace(package=package, models=models, hf=hf, tasks=tasks)
    parts.hf.HFLM, parts.tasks.TaskManager, parts.models.huggingface = HFLM, TaskManager, hf
    parts.package.models, parts.package.tasks = models, tasks
    parts.package.simple_evaluate, parts.package.__version__ = simple_evaluate, "0.0"
    for module in (package, models, hf, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose edits set a number from 0 to 1."""
    model = SimpleNamespace(weight=0)
    opened = SimpleNamespace(
        ledger=SimpleNamespace(adapter=SimpleNamespace(model=model, memory=None, patched=nullcontext)),
        tokenizer="tokenizer",
        entries=[1, 2, 3],
        apply=lambda: setattr(model, "weight", 1),
    )
    monkeypatch.setattr("lit_edit.runs.folder.open_run", lambda folder: opened)
    return tmp_path


def test_base_and_edited_are_measured_and_compared(run: Path, harness: Any, capsys: Any) -> None:
    assert main(["eval-harness", "--run", str(run), "--tasks", "sst2", "mmlu", "--limit", "50", "--shots", "2"]) == 0
    assert len(harness.asked) == 2
    asked = harness.asked[0]
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["sst2", "mmlu"], 50, 2)
    assert (asked["model"].tokenizer, asked["model"].batch_size) == ("tokenizer", 8)
    written = json.loads((run / "eval_harness.json").read_text())
    assert (written["lm_eval"], written["edits"], written["limit"], written["shots"]) == ("0.0", 3, 50, 2)
    assert written["results"]["base"]["sst2"]["acc,none"] == 1.0
    assert written["rows"][1] == {
        "task": "mmlu", "metric": "acc",
        "base": 1.0, "base_stderr": 0.1, "edited": 0.5, "edited_stderr": 0.1, "change": -0.5,
    }  # fmt: skip
    lines = [line for line in capsys.readouterr().out.splitlines() if "sst2" in line]
    assert [cell.strip() for cell in lines[0].strip("│").split("│")] == [
        "sst2", "acc", "1.0000 ± 0.1000", "0.5000 ± 0.1000", "-0.5000",
    ]  # fmt: skip


@pytest.mark.parametrize(("flag", "weight"), [("--base", 1.0), ("--edited", 0.5)])
def test_one_of_them_alone(run: Path, harness: Any, flag: str, weight: float) -> None:
    assert main(["eval-harness", "--run", str(run), "--tasks", "sst2", flag]) == 0
    results = json.loads((run / "eval_harness.json").read_text())["results"]
    assert results == {flag[2:]: {"sst2": {"alias": "sst2", "acc,none": weight, "acc_stderr,none": 0.1}}}


def test_without_lm_eval_it_is_said_how_to_get_it(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval-harness", "--run", str(run), "--tasks", "sst2"]) == 2
    err = capsys.readouterr().err
    assert 'pip install "lit-edit[harness]"' in err
    assert "lit_edit.callbacks.Ability" in err


def test_errors_are_said_in_a_sentence(run: Path, harness: Any, capsys: Any) -> None:
    for args, message in (
        (["--run", str(run / "gone"), "--tasks", "sst2"], "there is no run folder"),
        (["--run", str(run), "--tasks", "glue"], "lm-eval knows no task 'glue'; lm-eval ls tasks lists"),
        (["--run", str(run), "--tasks", "sst2", "--include_path", str(run / "gone")], "there is no such folder"),
    ):
        assert main(["eval-harness", *args]) == 2
        assert message in capsys.readouterr().err
    harness.failure = ConnectionError("offline")
    assert main(["eval-harness", "--run", str(run), "--tasks", "sst2"]) == 2
    assert "lm-eval cannot load sst2: offline; its tasks come from the hub" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["eval-harness", "--run", str(run), "--tasks", "sst2", "--shots", "-1"])
    assert stop.value.code == 2


def test_rows_leave_out_what_is_no_metric() -> None:
    base = {
        "g": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "sample_len": 4, "a": "b"}
    }
    (row,) = result_rows({"base": base})
    assert row == {
        "task": "g", "metric": "exact_match (strict-match)", "base": 0.25, "base_stderr": None, "change": None
    }  # fmt: skip


def test_groups_are_among_the_results() -> None:
    found = {"results": {"mmlu_law": {"acc,none": 0.5}}, "groups": {"mmlu": {"acc,none": 0.25, "tasks": ["mmlu_law"]}}}
    assert plain_results(found) == {"mmlu_law": {"acc,none": 0.5}, "mmlu": {"acc,none": 0.25}}
    assert plain_results(None) == {}


def test_numbers_of_numpy_are_numbers() -> None:
    """lm-eval answers F1 and Matthews' coefficient as ``numpy.float64``; truth values and words are no numbers."""
    import numpy as np

    from lit_edit.cli.eval_harness import _is_metric, _number

    assert _is_metric("f1,none", np.float64(0.5))
    assert _number(np.float64(0.5)) == 0.5
    for value in (True, "N/A", None, float("nan")):
        assert _number(value) is None
