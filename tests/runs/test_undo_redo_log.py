"""``undo``, ``redo`` and ``log``, on runs that have ended and on runs that were cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open

from lit_edit.cli.main import main
from lit_edit.errors import counted
from lit_edit.files.pictures import write_figure
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError
from lit_edit.report.curves import course, growth
from lit_edit.report.pictures import DRAWN, course_of, draw_course
from lit_edit.report.reading import read_run
from lit_edit.runs.files import deltas_path
from lit_edit.runs.folder import open_for_change, read_history
from lit_edit.runs.reading import read_log
from tests.runs.life import EDITS, contents, held, left_by, records_of, rows_of, same_as


def subject_of(folder: Path, number: int) -> str:
    return read_history(folder).entry(number).subject


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (["--edit=2"], [2]),
        (["--edit=1,3", "--edit=3-4"], [1, 3, 4]),
        (["--last=2"], [3, 4]),
        (["--subject", "{1}"], [1]),
        (["--id", "{id3}", "--last=1"], [3, 4]),
    ],
    ids=["number", "numbers and ranges", "last", "subject", "id and last"],
)
def test_undo_takes_out_what_was_named(args: list[str], out: list[int], finished: Path, capsys: Any) -> None:
    history = read_history(finished)
    names = {"{1}": f" {history.entry(1).subject.upper()} ", "{id3}": history.entry(3).id}
    assert main(["undo", f"--run={finished}", "--no-measure", *(names.get(arg, arg) for arg in args)]) == 0
    assert held(finished) == [number for number in range(1, 5) if number not in out]
    told = " ".join(capsys.readouterr().out.split())
    assert f"{counted(len(out), 'edit')} taken out, {EDITS - len(out)} in the model" in told
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["edits"], summary["undone"]) == (EDITS - len(out), len(out))
    assert "before" in summary["stale"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name the edits"),
        (["--edit=5"], "there is no edit 5; the edits of this ledger are 1 to 4"),
        (["--edit=0"], "there is no edit 0"),
        (["--edit=2-1"], "expected numbers like 17"),
        (["--edit=2-"], "expected numbers like 17"),
        (["--edit=x"], "expected numbers like 17"),
        (["--edit=1-99999999999999"], "too many numbers"),
        (["--last=0"], "--last 0: 4 edits are in the model"),
        (["--last=5"], "--last 5: 4 edits are in the model"),
        (["--subject=Nobody"], "--subject Nobody: there is no such edit"),
        (["--id=nothing"], "--id nothing: there is no such edit"),
        (["--edit=1", "--id=nothing"], "--id nothing: there is no such edit"),
    ],
)
def test_undo_of_what_there_is_not_changes_nothing(
    args: list[str], message: str, finished: Path, capsys: Any
) -> None:  # fmt: skip
    before = contents(finished)
    assert main(["undo", f"--run={finished}", *args]) == 2
    assert message in capsys.readouterr().err
    assert contents(finished) == before


@pytest.mark.parametrize("args", [["--edit=1"], ["--last=1"]])
def test_redo_of_what_holds_changes_nothing(args: list[str], finished: Path, capsys: Any) -> None:
    before = contents(finished)
    assert main(["redo", f"--run={finished}", *args]) == 2
    assert "in the model already" in (err := capsys.readouterr().err) or "there is nothing to redo: no edit" in err
    assert contents(finished) == before


def test_commands_without_a_run(runs: Path, capsys: Any) -> None:
    for command in ("undo", "redo", "log"):
        args = [] if command == "log" else ["--last=1"]
        assert main([command, f"--run={runs / 'gone'}", *args]) == 2
        assert "there is no run folder" in capsys.readouterr().err
    runs.mkdir()
    assert main(["log", f"--run={runs}"]) == 2
    assert "has no journal" in capsys.readouterr().err


def test_undo_and_redo_are_seen_by_everyone(finished: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(summary | {"ability": {"final": {}}, "age_curves": {}}))
    (finished / "figures").mkdir()
    assert main(["undo", f"--run={finished}", "--edit=1,4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 edits taken out, 2 in the model" in told
    assert "efficacy success" in told
    assert "measured over the 2 in the model" in told
    assert "Later edits were made on a model that had these" in told
    assert "undo --exact makes the later edits again" in told
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["edits"], summary["undone"], "stale" in summary) == (2, 2, False)
    assert "ability" not in summary  # of the model with all edits, and not measured again
    assert summary["before_change"] == {"ability": {"final": {}}, "age_curves": {}}
    assert [row["status"] for row in rows_of(finished)] == ["undone", "holds", "holds", "undone"]
    assert ["final_success" in row for row in rows_of(finished)] == [False, True, True, False]
    assert_drawn_as_it_is(finished)

    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert "after 2 edits" in capsys.readouterr().out
    assert main(["export", f"--run={finished}", f"--to={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with 2 facts changed" in card
    assert subject_of(finished, 2) in card
    assert f"| {subject_of(finished, 1)} |" not in card
    deltas, before = load_file(deltas_path(finished)), load_file(deltas_path(whole))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(json.loads(json.dumps(config_of(finished)))) / "model.safetensors")
    for name, delta in deltas.items():
        assert torch.equal(exported[name], (base[name].double() + delta).float())
        assert not torch.allclose(delta, before[name], atol=1e-6)

    assert main(["redo", f"--run={finished}", "--edit=4", "--edit=1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 edits put back, 4 in the model" in told
    assert "meanwhile" not in told  # nothing else was done
    for name, delta in load_file(deltas_path(finished)).items():
        torch.testing.assert_close(delta, before[name], rtol=1e-8, atol=1e-10)
    assert held(finished) == [1, 2, 3, 4]
    final = [json.loads((folder / "summary.json").read_text())["final"] for folder in (finished, whole)]
    assert final[0]["efficacy"] == pytest.approx(final[1]["efficacy"], rel=1e-4)
    assert_drawn_as_it_is(finished)


def test_an_undo_of_all_says_so(finished: Path, capsys: Any) -> None:
    (finished / "figures").mkdir()
    assert main(["undo", f"--run={finished}", f"--last={EDITS}"]) == 0
    assert "no edit is in the model any more" in capsys.readouterr().out
    assert held(finished) == []
    assert (finished / "figures" / "metrics.png").is_file()
    run = read_run(finished)
    assert course(run, "efficacy/accuracy")[-1][0] == 0  # of the model before; none is there to be measured
    assert course(run, "perplexity")[-1] == (EDITS, pytest.approx(course(run, "perplexity")[0][1]))


def assert_drawn_as_it_is(folder: Path) -> None:
    """Curves end in the numbers of the model as it is, and the pictures are those of the curves."""
    run = read_run(folder)
    final, layers = run.summary["final"], run.summary["layers"]
    for kind, name in DRAWN:
        assert course(run, f"{kind}/{name}")[-1] == (EDITS, pytest.approx(final[kind][name]))
    assert course(run, "perplexity")[-1] == (EDITS, pytest.approx(final["perplexity"]))
    for weight, points in growth(run).items():
        of_it = layers[weight]
        assert points[-1] == (EDITS, pytest.approx(of_it["mean_abs_after"] / of_it["mean_abs_before"] - 1))
        assert run.logged(f"norm/{weight}/mean_abs_delta")[-1] == (EDITS, pytest.approx(of_it["mean_abs_delta"]))
    assert [row["step"] for row in left_by(folder)["metrics"]] == [str(edits) for edits in range(EDITS + 1)]
    drawn = course_of(run)
    ages = [age for age, _ in drawn.by_age["final"]]
    assert ages == [*reversed(range(len(held(folder))))]
    for name, figure in draw_course(drawn).items():
        write_figure(folder.parent / "expected.png", figure)
        assert (folder / "figures" / f"{name}.png").read_bytes() == (folder.parent / "expected.png").read_bytes()


def config_of(folder: Path) -> str:
    import yaml

    return str(yaml.safe_load((folder / "config.yaml").read_text())["model"]["language_model"]["name"])


@pytest.mark.parametrize("exact", [True, False])
def test_exact_undo_is_a_run_without_the_edit(
    exact: bool, finished: Path, fit: Any, runs: Path, capsys: Any
) -> None:  # fmt: skip
    history = read_history(finished)
    facts = runs.parent / "facts.jsonl"
    requests = [history.entry(number).request for number in (1, 3, 4)]
    rows = [{name: r[name] for name in ("id", "prompt", "subject", "target_new", "target_true")} for r in requests]
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--data.source=facts", f"--data.path={facts}", "--data.target_window=1"]
    assert fit("--run_name=without", *args) == 0
    capsys.readouterr()
    assert main(["undo", f"--run={finished}", "--edit=2", "--no-measure", *(["--exact"] if exact else [])]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ("Later edits were made on a model that had these" in told) != exact
    one, other = (load_file(deltas_path(runs / name)) for name in ("x", "without"))
    off = max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)
    # Targets were fitted in other windows: float32 round-off.
    assert off < 1e-3 if exact else off > 1e-2


def test_an_undo_that_is_exact_by_itself_says_nothing(runs: Path, fit: Any, capsys: Any) -> None:
    assert fit("--run_name=base", "--model.editor.init_args.keys=base", "--data.limit=3") == 0
    capsys.readouterr()
    assert main(["undo", f"--run={runs / 'base'}", "--edit=1", "--no-measure"]) == 0
    assert "Later edits" not in capsys.readouterr().out


def test_a_process_that_dies_between_record_and_files(finished: Path, whole: Path, capsys: Any) -> None:
    with open_for_change(finished) as run:
        run.session.undo([2])
        expected = dict(run.stream.ledger.deltas)
    assert same_as(finished, whole) == ["records"]  # the files are of the state before
    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert "after 3 edits" in capsys.readouterr().out
    found = load_file(deltas_path(finished))
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())
    assert held(finished) == [1, 3, 4]
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["edits"], summary["undone"]) == (3, 1)
    assert "stale" in summary
    before = contents(finished)
    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert contents(finished) == before  # once is enough


def test_an_unfinished_run_goes_on_behind_an_undo(killed: Path, fit: Any, whole: Path, capsys: Any) -> None:
    assert main(["undo", f"--run={killed}", "--edit=2"]) == 0
    assert "1 edit taken out, 2 in the model" in " ".join(capsys.readouterr().out.split())
    assert main(["ask", f"--run={killed}", "Hello there", "--tokens=1"]) == 0
    assert "after 2 edits" in capsys.readouterr().out
    assert fit("--run_name=x", "--resume=auto") == 0
    kinds = [record["kind"] for record in records_of(killed)]
    assert kinds == ["begin", "edit", "edit", "edit", "undo", "edit", "end"]
    assert held(killed) == [1, 3, 4]
    summary = json.loads((killed / "summary.json").read_text())
    assert (summary["edits"], summary["undone"], "stale" in summary) == (3, 1, False)
    metrics = left_by(killed)["metrics"]
    assert [row["step"] for row in metrics] == ["0", "1", "2", "3", "4"]
    assert metrics[:3] == left_by(whole)["metrics"][:3]
    with open_for_change(killed) as run:  # from the newest checkpoint, and from the journal alone
        expected = dict(run.stream.ledger.deltas)
    shutil.rmtree(killed / "checkpoints")
    with open_for_change(killed) as run:
        assert all(torch.equal(value, expected[name]) for name, value in run.stream.ledger.deltas.items())


def test_a_cut_run_is_a_run(
    killed: Path, fit: Any, whole: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What it has made is asked, taken away, gone on from and undone; each says that it was not finished."""
    made = len(read_history(killed).made)
    assert 0 < made < EDITS
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "cola.jsonl").write_text(
        "".join(json.dumps({"sentence": f"Is it {n}?", "label": n % 2}) + "\n" for n in range(12))
    )
    assert not deltas_path(killed).is_file()
    told = f"was not finished: it has made {made} edits"
    out = tmp_path / "delta.safetensors"
    for args in (
        ["ask", f"--run={killed}", "Hello there", "--tokens=1", "--json"],
        ["log", f"--run={killed}"],
        ["export", f"--run={killed}", "--as=delta", f"--out={out}"],
        ["report", f"--run={killed}"],
        ["ability", f"--run={killed}", f"--folder={tasks}", "--tasks", "cola", "--limit=2", f"--out={tmp_path / 'a'}"],
    ):
        caplog.clear()
        assert main(args) == 0, args
        assert told in caplog.text or "not finished" in (killed / "report.html").read_text()
        assert (args[0] == "report") or told in caplog.text
    with safe_open(out, "pt") as file:
        assert len(json.loads(file.metadata()["edits"])) == made
    assert fit("--run_name=y", f"--continue={killed}", "--data.offset=4", "--data.limit=1") == 0
    assert len(read_history(killed.parent / "y").made) == made + 1
    measured = json.loads((tmp_path / "a" / "ability.json").read_text())
    assert [point["edits"] for point in measured["points"]] == [0, made]
    assert fit("--run_name=x", "--resume=auto") == 0  # and none of this is in its way
    assert same_as(killed, whole) == []
    caplog.clear()
    assert main(["log", f"--run={killed}"]) == 0
    assert "not finished" not in caplog.text


def test_log_lists_the_ledger(finished: Path, capsys: Any) -> None:
    assert main(["undo", f"--run={finished}", "--edit=3", "--no-measure"]) == 0
    capsys.readouterr()
    before = contents(finished)
    assert main(["log", f"--run={finished}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["number"], row["status"]) for row in rows] == [(1, "holds"), (2, "holds"), (3, "undone"), (4, "holds")]
    assert [(row["state"], row["holds"]) for row in rows[1:3]] == [("not measured", None), ("undone", False)]
    assert all(0 <= row["target_probability"] <= 1 for row in rows)
    assert main(["log", f"--run={finished}", "--json", "--last=2"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == [3, 4]
    assert main(["log", f"--run={finished}", f"--subject={subject_of(finished, 2).upper()}", "--json"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == [2]
    assert main(["log", f"--run={finished}"]) == 0
    told = capsys.readouterr().out
    assert "4 edits made, 3 in the model; whether they hold was not measured; 1 undone" in told
    assert "\n  3 undone: “" in told
    assert main(["log", f"--run={finished}", "--failed"]) == 0
    assert "undone: “" not in capsys.readouterr().out  # nobody says that it failed
    for args in (["--last=0"], ["--last=-1"]):
        with pytest.raises(SystemExit) as stop:
            main(["log", f"--run={finished}", *args])
        assert stop.value.code == 2
    assert contents(finished) == before


def test_log_tells_what_was_refused(runs: Path, fit: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = EditLedger.check

    def refuse(ledger: EditLedger, updates: Any, entries: Any) -> Any:
        if len(ledger.history.handled) == 1 and entries:
            raise EditRefusedError("it would do harm [really]")
        return check(ledger, updates, entries)

    monkeypatch.setattr(EditLedger, "check", refuse)
    assert fit("--run_name=x", "--model.on_refused=skip", "--data.limit=3") == 0
    assert main(["log", f"--run={runs / 'x'}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "it would do harm [really]" in told
    assert "2 edits made, 0 hold; 1 refused" in told
    assert "refused, builtin_facts.json:2: “The language spoken by most people in Mexico is” → “Polish”" in told
    assert json.loads((runs / "x" / "summary.json").read_text())["refused"] == 1


FACTS = """prompt,subject,target_new
The capital of Italy is,Italy,Vienna
The capital of Spain is,,Oslo
The capital of Italy is,Italy,Paris
The mother tongue of Ada is,Ada,Greek
The currency of Chad is,Chad,peso
"""


def test_what_is_left_out_is_written_down(
    runs: Path, fit: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken record, one like an earlier one, and a harmful one: with file, line and reason, wherever one looks."""
    check = EditLedger.check

    def refuse(ledger: EditLedger, updates: Any, entries: Any) -> Any:
        if any(entry.subject == "Ada" for entry in entries):
            raise EditRefusedError("it would do harm")
        return check(ledger, updates, entries)

    monkeypatch.setattr(EditLedger, "check", refuse)
    path = tmp_path / "facts.csv"
    path.write_text(FACTS)
    skips = ["--data.on_error=skip", "--model.on_refused=skip", "--model.on_conflict=refuse"]
    data = ["--data.source=file", f"--data.path={path}"]
    capsys.readouterr()
    assert fit("--run_name=x", *data, *skips, "--trainer.callbacks+=lit_edit.callbacks.ClosingTable") == 0
    closing = " ".join(capsys.readouterr().out.split())
    summary = json.loads((runs / "x" / "summary.json").read_text())
    found = [(row["kind"], row["file"], row["line"], row["target_new"]) for row in summary["left_out"]]
    file = str(path)
    assert found == [("broken", file, 3, ""), ("conflict", file, 4, "Paris"), ("refused", file, 5, "Greek")]
    assert all(row["reason"] for row in summary["left_out"])
    assert main(["report", f"--run={runs / 'x'}"]) == 0
    capsys.readouterr()
    assert main(["log", f"--run={runs / 'x'}"]) == 0
    log = " ".join(capsys.readouterr().out.split())
    page = (runs / "x" / "report.html").read_text()
    for row in summary["left_out"]:
        for told in (closing, log):
            assert f"{row['file']}:{row['line']}" in told
            assert row["reason"] in told
        assert f"{row['file']}:{row['line']}" in page
    assert "2 refused, 1 left out" in closing
    assert "1 broken record left out" in closing
    (runs / "x" / "summary.json").unlink()  # as of a run that was cut: the journal has them
    assert len([v for v in read_log(runs / "x").verdicts if v.place]) == 3
