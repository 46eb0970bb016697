"""The command line, on a tiny model: what a run leaves behind, exit status, errors."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from lit_edit.cli.main import HELP, main
from tests.cli.test_registry import imported_by

FAST = [
    "--model.editor.init_args.layers=[1,2]",
    "--model.editor.init_args.target.steps=4",
    "--model.editor.init_args.contexts=plain",
    "--model.statistics.tokens=0",
]


@pytest.fixture
def run_in(tmp_path: Path, tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``lit-edit fit`` on the tiny model in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, command: str = "fit", limit: int = 3) -> int:
        base = [
            command,
            "--config",
            "quickstart",
            f"--model.language_model.name={tiny_folder}",
            f"--data.limit={limit}",
        ]
        return main([*base, *FAST, "--trainer.accelerator=cpu", *args])

    return run


@pytest.fixture(scope="module")
def finished_once(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(folder / "cache"))
        args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", "--data.limit=3", *FAST]
        assert main([*args, "--trainer.accelerator=cpu", f"--runs_dir={folder}/runs", "--run_name=x"]) == 0
    return folder / "runs" / "x"


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to do anything with."""
    return Path(shutil.copytree(finished_once, tmp_path / "runs" / "x"))


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    left = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "summary.json",
        "metrics.csv",
        "ledger/deltas.safetensors",
        "ledger/edits.jsonl",
        "checkpoints/last.ckpt",
        "figures/metrics.png",
        "figures/l1_norms.png",
        "figures/forgetting.png",
    } <= left


def test_summary_has_the_promised_shape(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["edits"] == 3
    for stage in ("base", "immediate", "final"):
        for kind in ("efficacy", "generalization", "locality"):
            assert {"success", "magnitude", "accuracy"} <= set(summary[stage][kind])
        assert "agreement" in summary[stage]["locality"]
        assert "score" in summary[stage]
    assert summary["base"]["locality"]["agreement"] == 1.0
    assert summary["final"]["perplexity"] > 0
    assert set(summary["seconds"]) == {"statistics", "targets", "keys", "solve", "metrics", "per_edit"}
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    assert set(summary["layers"]) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    for norms in summary["layers"].values():
        assert norms["mean_abs_delta"] > 0
        assert norms["mean_abs_after"] != norms["mean_abs_before"]


def test_metrics_have_a_row_per_edit(finished: Path) -> None:
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["base/efficacy/success"] != ""
    assert all(row["immediate/efficacy/success"] != "" for row in rows[1:])
    assert rows[-1]["final/efficacy/success"] != ""


def test_two_runs_of_one_config_give_the_same_weights(finished: Path, run_in: Any) -> None:
    assert run_in("--run_name=y") == 0
    one, other = (load_file(finished.parent / name / "ledger" / "deltas.safetensors") for name in "xy")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ask_shows_both_answers(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--run", str(finished), "The capital of Italy is", "--tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "base model" in out
    assert "after 3 edits" in out


def test_export_gives_the_edited_model(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert main(["export", "--run", str(finished), "--to", str(tmp_path / "out")]) == 0
    base, edited = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_folder, tmp_path / "out"))
    deltas = load_file(finished / "ledger" / "deltas.safetensors")
    for name, weight in edited.named_parameters():
        before = base.get_parameter(name)
        expected = (before.double() + deltas[name]).float() if name in deltas else before
        assert torch.equal(weight, expected), name
    assert "Vienna" in (tmp_path / "out" / "README.md").read_text()


def test_a_cut_run_resumes_from_another_folder(
    finished: Path, run_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_in("--run_name=cut", "--trainer.max_steps=2") == 0
    cut, elsewhere = tmp_path / "runs" / "cut", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    args = ["--config", str(cut / "config.yaml"), f"--ckpt_path={cut}/checkpoints/last.ckpt", "--trainer.max_steps=-1"]
    assert main(["fit", *args]) == 0
    assert list(elsewhere.iterdir()) == []
    one, other = (load_file(run / "ledger" / "deltas.safetensors") for run in (finished, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((cut / "summary.json").read_text())["edits"] == 3


@pytest.mark.parametrize("content", [b"garbage", b"", "half"])
def test_damaged_checkpoints_are_refused(
    finished: Path, run_in: Any, tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (finished / "checkpoints" / "last.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(good[: len(good) // 2] if content == "half" else content)
    assert run_in(f"--ckpt_path={bad}") == 2
    assert "damaged, or not a checkpoint of lit-edit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [["--model.editor.init_args.layers=[1,2,3]"], ["--model.editor.class_path=lit_edit.editors.MEMIT"]]
)
def test_a_checkpoint_of_another_config_is_refused(
    finished: Path, run_in: Any, change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_in(f"--ckpt_path={finished}/checkpoints/last.ckpt", *change) == 2
    assert "use the config that" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    run_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_edit.stream.edit_stream import EditStream

    apply_edit = EditStream.apply_edit

    def interrupt(stream: EditStream, proposal: Any) -> None:
        if len(stream.ledger) == 2:
            raise KeyboardInterrupt
        apply_edit(stream, proposal)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(EditStream, "apply_edit", interrupt)
    with pytest.raises(SystemExit) as stop:
        run_in("--run_name=cut")
    monkeypatch.setattr(EditStream, "apply_edit", apply_edit)
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert stop.value.code == 130
    last = tmp_path / "runs" / "cut" / "checkpoints" / "last.ckpt"
    config = last.parents[1] / "config.yaml"
    assert f"lit-edit fit --config {config} --resume auto" in capsys.readouterr().err
    assert main(["fit", "--config", str(config), "--resume", "auto"]) == 0
    assert json.loads((last.parents[1] / "summary.json").read_text())["edits"] == 3


def test_resume_goes_on_in_the_same_folder(finished: Path, run_in: Any) -> None:
    before = load_file(finished / "ledger" / "deltas.safetensors")
    assert run_in(f"--ckpt_path={finished}/checkpoints/last.ckpt") == 0
    after = load_file(finished / "ledger" / "deltas.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in finished.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_commands(finished: Path, run_in: Any, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in(f"--ckpt_path={finished}/checkpoints/last.ckpt", command=command) == 0
    out = capsys.readouterr().out
    assert "on a model with 3 edits" in out
    assert "locality agreement" in out


def test_tensorboard_works(run_in: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run_in("--run_name=tb", "--trainer.logger=tensorboard") == 0
    assert list((tmp_path / "runs" / "tb").glob("events.out.tfevents.*"))
    assert (tmp_path / "runs" / "tb" / "metrics.csv").is_file()


def test_own_facts_with_three_columns(run_in: Any, tmp_path: Path) -> None:
    facts = tmp_path / "facts.csv"
    facts.write_text("prompt,subject,target_new\nThe capital of Peru is,Peru,Oslo\nAcme makes,Acme,bread\n")
    assert run_in("--run_name=own", "--data.source=facts", f"--data.path={facts}") == 0
    summary = json.loads((tmp_path / "runs" / "own" / "summary.json").read_text())
    assert summary["edits"] == 2
    assert summary["final"]["efficacy"]["accuracy"] is not None
    assert summary["final"]["efficacy"]["success"] is None
    assert summary["final"]["score"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "nonsense"], "no config of that name ships"),
        (["--config", "quickstart", "--data.source=facts", "--data.path=gone.csv"], "gone.csv: no such file"),
        (["--config", "quickstart", "--data.source=facts"], "needs data.path"),
        (["--config", "quickstart", "--data.limit=0"], "data.limit must be at least 1"),
        (["--config", "quickstart", "--run_name=../up"], "plain folder name"),
        (["--config", "quickstart", "--ckpt_path=gone.ckpt"], "no such file"),
        (["--config", "quickstart", "--model.editor.init_args.covariance_weight=-1"], "must be positive"),
        (["--config", "quickstart", "--model.editor.init_args.target.lr=-1"], "lr must be positive"),
        (["--config", "quickstart", "--model.language_model.name=no-such-model"], "there is no model 'no-such-model'"),
        (["--config", "quickstart", "--model.statistics.corpus=gone.txt"], "neither 'sampled'"),
        (["--config", "quickstart", "--trainer.strategy=ddp_spawn"], "use ddp (a whole model on each device)"),
        (["--config", "quickstart", "--trainer.strategy=fsdp", "--trainer.devices=2"], "cannot run with"),
        (["--config", "quickstart", "--model.editor.init_args.target.loss_threshold=.nan"], "loss_threshold"),
    ],
)
def test_bad_arguments_end_with_2(
    args: list[str], message: str, tmp_path: Path, tiny_folder: Path, own_cache: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if not any("language_model" in arg for arg in args):
        args = [*args, f"--model.language_model.name={tiny_folder}"]
    try:
        status = main(["fit", *args, *FAST[2:]])
    except SystemExit as stop:  # jsonargparse
        status = stop.code
    assert status == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_layer_that_does_not_exist(run_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in("--model.editor.init_args.layers=[99]") == 2
    assert "this model has layers 0 to 3" in capsys.readouterr().err


def test_a_broken_line_is_named_before_the_model_is_loaded(run_in: Any, tmp_path: Path, capsys: Any) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "A is", "subject": "A", "target_new": "b"}\n{"prompt": "C is"}\n')
    args = ["--data.source=facts", f"--data.path={facts}", "--model.language_model.name=no-such-model"]
    assert run_in(*args) == 2
    assert f"{facts}:2: missing field" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_overwritten_unasked(finished: Path, run_in: Any, capsys: Any) -> None:
    before = (finished / "summary.json").read_bytes()
    assert run_in("--run_name=x") == 2
    assert "exists; go on where it was cut with --resume auto" in capsys.readouterr().err
    assert (finished / "summary.json").read_bytes() == before
    assert run_in("--run_name=x", "--overwrite=true") == 0


def test_a_folder_that_is_no_run_is_not_deleted(run_in: Any, tmp_path: Path) -> None:
    precious = tmp_path / "runs" / "x" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    assert run_in("--run_name=x", "--overwrite=true") == 2
    assert precious.read_text() == "years of work"


def test_ask_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--run", str(tmp_path / "gone"), "Hello"]) == 2
    assert "there is no run folder" in capsys.readouterr().err


def test_ask_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ask", "--run", str(finished), " "])
    assert stop.value.code == 2
    assert "must not be empty" in capsys.readouterr().err


def test_export_to_where_nothing_can_be_made(finished: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", "--run", str(finished), "--to", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_statistics_of_too_uniform_text(run_in: Any, tmp_path: Path, capsys: Any) -> None:
    corpus = tmp_path / "same.txt"
    corpus.write_text("One line and no other.\n" * 400)
    assert run_in(f"--model.statistics.corpus={corpus}") == 2
    assert "not positive definite" in capsys.readouterr().err


def test_a_run_without_progress_bar(run_in: Any) -> None:
    assert run_in("--run_name=quiet", "--trainer.enable_progress_bar=false") == 0


def test_models_lists_what_there_is(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out
    assert "method/d4s_paper" in out.replace("\n", "")


def test_stats_alone(tiny_folder: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["stats", "--model", str(tiny_folder), "--layers", "1", "2", "--tokens", "0"]
    assert main(args) == 0
    assert "computed in" in capsys.readouterr().out
    assert len(list(own_cache.rglob("layer*.safetensors"))) == 2
    assert main(args) == 0
    assert "found in the cache" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "status"), [(["--help"], 0), ([], 2)])
def test_help(args: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == status
    assert capsys.readouterr().out == HELP


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    assert "unknown command 'frobnicate'" in capsys.readouterr().err


def test_fit_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option, words in (
        ("--model.language_model.name", "A packaged model"),
        ("--data.on_error", "What to do about a broken record"),
        ("--data.target_window", "Edits whose targets are fitted together"),
        ("--model.statistics.corpus", "the model writes the text itself"),
        ("--run_name", "Name of the run"),
    ):
        assert option in text
        assert words in " ".join(text.split())
    assert text.startswith("usage: lit-edit fit [--config NAME ...]")
    assert "``" not in text
    places = [
        text.index(words) for words in ("examples:", "--method", "options:", "--data.source", "--trainer.devices")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("args", "editor", "setting"),
    [
        ([], "D4S", "covariance_weight"),
        (["--method", "rome"], "ROME", "target.lr"),
        (["--config", "method/grace"], "GRACE", "radius"),
        (["--model.editor=lit_edit.editors.FT"], "FT", "lr"),
    ],
)
def test_fit_help_has_the_settings_of_the_editor(
    args: list[str], editor: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *args, "--help"])
    told = capsys.readouterr().out.partition(f"Settings of the editor {editor} ")[2]
    assert f"\n  --model.editor.init_args.{setting}\n" in told


def test_nothing_heavy_is_imported_for_the_help() -> None:
    code = (
        "import sys; from lit_edit.cli.main import main; main(['--help']); "
        "print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_log_and_report_of_a_run_do_without_torch(finished: Path) -> None:
    calls = [
        ["log", "--run", str(finished)],
        ["log", "--run", str(finished), "--json"],
        ["report", "--run", str(finished)],
    ]
    found = imported_by(calls, finished.parent)
    assert {call: heavy for call, (_, heavy) in found.items() if heavy} == {}
    assert {status for status, _ in found.values()} == {0}
    assert "Vienna" in (finished / "report.html").read_text()


def test_a_config_of_another_run_leaves_that_run_alone(finished: Path, run_in: Any, tmp_path: Path) -> None:
    config = (finished / "config.yaml").read_text()
    first = Path(yaml.safe_load(config)["trainer"]["default_root_dir"])  # the run that was copied
    kept = (first / "checkpoints" / "last.ckpt").read_bytes()
    args = ("--config", str(finished / "config.yaml"), "--run_name=other", f"--runs_dir={tmp_path}/runs")
    assert run_in(*args, limit=1) == 0
    assert (first / "checkpoints" / "last.ckpt").read_bytes() == kept
    assert (tmp_path / "runs" / "other" / "checkpoints" / "last.ckpt").is_file()


def test_a_full_disk_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.ckpt")

    monkeypatch.setattr("lit_edit.cli.fit.run_training", full)
    assert main(["fit", "--config", "quickstart"]) == 1
    assert "the disk is full" in capsys.readouterr().err


def test_an_error_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=3, file=sys.stderr, mininterval=0) as bar:
        bar.update()
        assert main(["nothing-like-it"]) == 2
    written = capsys.readouterr().err.replace("\x1b[A", "\r")  # where other bars are open, it goes up to them
    lines = written.replace("\r", "\n").splitlines()
    assert [line for line in lines if "error" in line] == [
        "lit-edit: error: unknown command 'nothing-like-it'; lit-edit --help lists all"
    ]
