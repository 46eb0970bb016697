"""Slips of the pen: one line, with the nearest right name, whatever was mistyped and wherever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_edit.cli.main import main
from lit_edit.cli.registry import COMMANDS
from lit_edit.console.fit_parser import FitParser
from lit_edit.errors import ArgumentError, did_you_mean, nearest
from tests.cli.test_registry import maker  # noqa: F401 - a fixture


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that is refused says: a line."""
    try:
        status: object = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2, words
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_every_option_of_every_command_that_is_mistyped_is_told(
    maker: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = set()
    for command, part, parser in maker.parsers():
        names = [name for name in parser._option_string_actions if name.startswith("--")]
        for name in names:
            wrong = f"{name[:-2]}{name[-1]}{name[-2]}"
            if len(name) < 6 or wrong == name or wrong in names or parser._takes_settings:
                continue
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([wrong, "x"])
            lines = capsys.readouterr().err.splitlines()
            assert (stop.value.code, len(lines)) == (2, 1), (command.name, part, lines)
            assert f"did you mean {name}?" in lines[0], (command.name, part, lines)
            tried.add(command.name)
    assert len(tried) > 12


@pytest.mark.parametrize("command", [c.name for c in COMMANDS if c.name not in ("study", "build", "completion")])
def test_an_unknown_option_is_a_line_and_status_2(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--qqzzxx" in said([command, "--qqzzxx", "3"], capsys)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["fti"], "did you mean fit?"),
        (["exprt"], "did you mean export?"),
        (["fit", "--limti", "3"], "did you mean --limit?"),
        (["fit", "--on_conflict", "refuse"], "did you mean --model.on_conflict?"),
        (["validate", "--max-steps", "3"], "did you mean --trainer.max_steps?"),
        (["fit", "--config", "quickstrat"], "Did you mean quickstart?"),
        (["fit", "--config", "d4s_papr"], "Did you mean method/d4s_paper?"),
        (["fit", "--method", "roem"], "Did you mean rome?"),
        (["editors", "D4X"], "did you mean D4S?"),
        (["compare", "--confgi", "compare"], "did you mean --config?"),
        (["compare", "--config", "compare", "--limti", "3"], "did you mean --limit?"),
        (["export", "--run", ".", "--as", "modle"], "did you mean model?"),
        (["study", "mqdd"], "did you mean mqd?"),
        (["ask", "--rum", "x", "y"], "did you mean --run?"),
    ],
)
def test_a_slip_of_the_pen_is_told_what_was_meant(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert meant in said(words, capsys)


@pytest.mark.parametrize("name", ["nope", "xyzzy", "zzz"])
def test_what_is_near_nothing_is_told_where_all_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(["fit", "--config", name], capsys)
    assert "id you mean" not in line
    assert "lit-edit models lists them" in line
    assert "id you mean" not in said([name], capsys)


@pytest.fixture(scope="module")
def parser() -> FitParser:
    return FitParser()


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ("data: {limt: 3}", "there is no setting data.limt; did you mean data.limit?"),
        ("modle: {on_conflict: refuse}", "did you mean model.on_conflict?"),
        ("trainer: {max_setps: 3}", "did you mean trainer.max_steps?"),
        ("model: {editor: D4X}", "model.editor: there is no D4X; did you mean D4S?"),
        ("model: {editor: {class_path: lit_edit.editors.MEMTI}}", "did you mean MEMIT?"),
        ("model: {editor: {class_path: D4S, init_args: {layrs: [3]}}}", "has no setting layrs; did you mean layers?"),
        ("model: {editor: {class_path: D4S, init_args: {lamda: 3}}}", "has no setting lamda; it has layers, cov"),
        ("model: {on_conflict: refues}", "got refues; did you mean refuse?"),
        ("data: {source: zsr}", "got zsr; did you mean zsre?"),
        ("data: {on_error: skp}", "did you mean skip?"),
        ("resume: aut", "did you mean auto?"),
        ("trainer: {callbacks: LayerNrms}", "did you mean LayerNorms?"),
        ("trainer: {callbacks: [{class_path: lit_edit.callbacks.LayerNorm}]}", "did you mean LayerNorms?"),
        (
            "trainer: {callbacks: [{class_path: lit_edit.callbacks.Retention, init_args: {evry: 3}}]}",
            "lit_edit.callbacks.Retention has no setting evry; did you mean every?",
        ),
        ("trainer: {logger: wandbb}", "trainer.logger: there is no wandbb; did you mean wandb?"),
    ],
)
def test_a_slip_in_a_config_is_told_what_was_meant(
    parser: FitParser, settings: str, meant: str, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(settings)
    with pytest.raises(ArgumentError) as error:
        parser.parse(["--config", "quickstart", "--config", str(tmp_path / "own.yaml")])
    assert meant in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 320


def test_near_is_near_whatever_the_case_and_the_strokes() -> None:
    assert nearest("On-Conflit", ["on_conflict", "on_error"]) == ["on_conflict"]
    assert nearest("MEMT", ["memit", "ROME"]) == ["memit"]
    assert did_you_mean("q", ["fit", "plan"]) == ""
