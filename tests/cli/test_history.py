"""What a run says at its end of its edits, and ``lit-edit log`` later: from the fit to the words."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_edit.cli.main import main
from lit_edit.runs.holding import Verdict, closing_lines, headline
from lit_edit.runs.reading import read_log

CONFIG = """\
seed_everything: 0
model:
  language_model: {{name: {model}}}
  editor:
    class_path: lit_edit.editors.FT
    init_args: {{loss: target, layers: [2], lr: 0.01, steps: 100}}
data: {{source: facts, path: {facts}}}
trainer:
  accelerator: cpu
  callbacks:
    - class_path: lit_edit.callbacks.EditProgressBar
    - class_path: lit_edit.callbacks.Retention
      init_args: {{every: 2}}
    - class_path: lit_edit.callbacks.RunFolder
    - class_path: lit_edit.callbacks.ClosingTable
"""
FACTS = """\
prompt,subject,target_new
Ana Quill lives in,Ana Quill,Oslo
The capital of Italy is,Italy,Rome
Ana Quill works for,Ana Quill,Acme
The capital of Italy is,Italy,Vienna
The capital of Peru is,Peru,Rome
"""


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    (folder / "facts.csv").write_text(FACTS)
    (folder / "config.yaml").write_text(CONFIG.format(model=tiny_folder, facts=folder / "facts.csv"))
    return folder


@pytest.fixture
def fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_EDIT_CACHE", str(folder / "cache"))
    for name in ("handlers", "level"):
        monkeypatch.setattr(logging.root, name, getattr(logging.root, name))
    return lambda *args: main(["fit", "--config", str(folder / "config.yaml"), "--run_name=x", *args])


def measured(run: Path) -> dict[int, bool]:
    """Whether each edit in the model holds, from what was answered to it at the end."""
    rows = [json.loads(line) for line in (run / "ledger" / "answers.jsonl").read_text().splitlines()]
    return {row["number"]: row["prompts"][0]["final"]["hit"] for row in rows if "final" in row["prompts"][0]}


def test_the_closing_words_say_what_was_measured_and_log_says_the_same(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--model.on_conflict=average") == 0
    told, run = capsys.readouterr().out, tmp_path / "runs" / "x"
    summary, held = json.loads((run / "summary.json").read_text()), measured(run)
    assert summary["final"]["efficacy"]["accuracy"] == pytest.approx(sum(held.values()) / 5)
    assert 0 < sum(held.values()) < 5  # of both kinds there are some
    verdicts = read_log(run).verdicts
    assert {v.number: v.state == "holds" for v in verdicts} == held
    by_number: dict[Any, Verdict] = {v.number: v for v in verdicts}
    assert by_number[1].state == "forgotten"
    assert any("it shares its subject with edit 3" in reason for reason in by_number[1].reasons)
    assert "and no longer when it was measured after edit" in by_number[1].reasons[0]
    lines = closing_lines(verdicts, "runs/x")
    assert "\n".join(lines) in told
    assert lines[0] == f"5 edits made, {sum(held.values())} hold{'s' if sum(held.values()) == 1 else ''}"

    assert main(["log", "--run=runs/x", "--failed"]) == 0
    failed = capsys.readouterr().out.splitlines()
    assert lines[0] in failed
    assert failed[failed.index("Go on with") :] == lines[lines.index("Go on with") :]
    assert [line for line in lines if line.startswith(("  1 ", "  2 "))] == [
        line for line in failed if line.startswith(("  1 ", "  2 "))
    ]
    assert main(["log", "--run=runs/x", "--failed", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["number"] for row in rows} == {number for number, hit in held.items() if not hit}
    assert all(row["holds"] is False and row["said"] and row["reasons"] for row in rows)
    assert main(["log", "--run=runs/x"]) == 0
    assert lines[0] in capsys.readouterr().out.splitlines()


def test_json_is_one_object_and_the_run_keeps_nothing_of_it(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--json", "--data.limit=4") == 0
    told, run = json.loads(capsys.readouterr().out), tmp_path / "runs" / "x"
    assert (told["run"], told["ended"]) == ("runs/x", True)
    assert told["edits"] == {
        "made": 4,
        "in_model": 3,
        "holding": sum(measured(run).values()),
        "refused": 0,
        "left_out": 0,
    }
    assert told["final"] == json.loads((run / "summary.json").read_text())["final"]
    states = {failure["number"]: failure["state"] for failure in told["failures"]}
    assert [(row["number"], row["state"]) for row in told["taken_out"]] == [(2, "replaced")]  # by the fourth
    assert set(states) == {number for number, hit in measured(run).items() if not hit}
    config = (run / "config.yaml").read_text()
    assert "\njson:" not in config
    assert "\nquiet:" not in config
    with pytest.raises(SystemExit) as stop:
        fit("--json", "--data.limit=4", "--resume=auto")  # has ended
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == told


def test_quiet_says_where_and_nothing_else(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--quiet", "--data.limit=2") == 0
    out, err = capsys.readouterr()
    assert out == "runs/x\n"
    assert "edits" not in err  # no bar


def test_what_was_taken_out_is_told_apart(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--quiet", "--data.limit=2") == 0
    capsys.readouterr()
    verdicts = read_log(tmp_path / "runs" / "x").verdicts
    assert headline(verdicts).startswith("2 edits made")
    assert main(["models", "--json"]) == 0
    assert "quickstart" in json.loads(capsys.readouterr().out)["configs"]
    assert main(["ask", "--run=runs/x", "--tokens=2", "--json", "The capital of Italy is"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert set(answer) == {"prompt", "base", "edited"}
    assert answer["base"] != answer["edited"]
