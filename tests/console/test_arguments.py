"""One name for one thing: every spelling of an option leads to the same."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from lit_edit.console.arguments import CommandParser, make_parser, read_layers
from lit_edit.console.configs import method_config
from lit_edit.console.words import full_settings, read_settings
from lit_edit.errors import ArgumentError
from tests.cli.test_registry import maker  # noqa: F401 - a fixture


def value_of(action: argparse.Action) -> str:
    """A value that an option takes."""
    if action.choices:
        return str(next(iter(action.choices)))
    kind: Any = action.type or str
    check: Any = getattr(action, "check", str)
    for word in ("3", "80GB", "0.5", "rome", "smollm2-135m", ".", "x"):
        try:
            check(kind(word))
        except (ValueError, argparse.ArgumentTypeError):
            continue
        return word
    raise AssertionError(f"no value for {action.option_strings}")


def needed(parser: CommandParser, but: str) -> list[str]:
    words = []
    for action in parser._actions:
        if not action.option_strings and action.nargs != "?":
            words.append(value_of(action))
        elif action.required and but not in action.option_strings:
            words += [action.option_strings[0], value_of(action)]
    return words


def test_all_spellings_of_all_commands_lead_to_the_same(
    maker: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_edit.console.arguments.newest_run", lambda: Path("runs/newest"))
    tried = 0
    for command, part, parser in maker.parsers():
        actions = {name: action for action in parser._actions for name in action.option_strings if name[:2] == "--"}
        spellings = dict(parser._aliases)
        spellings |= {name.replace("_", "-"): name for name in actions}
        spellings |= {f"--{name[2:].replace('-', '_')}": name for name in actions}
        for spelling, name in spellings.items():
            if name == "--help":
                continue
            action = actions[name]
            value = [] if action.nargs == 0 else [value_of(action)]
            words = needed(parser, name)
            shown = parser.parse_known_args([*words, name, *value])
            assert parser.parse_known_args([*words, spelling, *value]) == shown, (command.name, part, spelling)
            if value:
                assert parser.parse_known_args([*words, f"{spelling}={value[0]}"]) == shown
            assert shown[1] == []
            tried += 1
    assert tried > 200


def test_former_spellings_are_not_shown(maker: Any) -> None:  # noqa: F811
    for _, _, parser in maker.parsers():
        parser.usage = None
        shown = set(re.findall(r"--[\w.-]+", parser.format_usage()))
        assert "--help" not in shown
        assert not shown & set(parser._aliases)


def parser_with_options(**more: Any) -> CommandParser:
    parser = make_parser("x", "", **more)
    parser.add_argument("--run", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("words", nargs="*")
    return parser


@pytest.mark.parametrize(("typed", "near"), [("--rnu", "--run"), ("--dryrun", "--dry-run"), ("--xyzzy", "")])
def test_a_wrong_option_is_told_the_nearest_in_the_last_line(
    typed: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parser_with_options().parse_args([typed, "x"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    meant = f"; did you mean {near}?" if near else ""
    assert last == f"lit-edit x: error: there is no option {typed}{meant}"


def test_values_and_what_stands_behind_two_dashes_are_left_alone() -> None:
    options = parser_with_options().parse_args(["--run", "a_b-c", "-- this is a prompt", "--", "--rnu"])
    assert options.run == "a_b-c"
    assert options.words == ["-- this is a prompt", "--rnu"]


def test_a_beginning_stands_for_the_one_option_that_has_it() -> None:
    assert parser_with_options().parse_args(["--run", "x", "--dr"]).dry_run
    found, rest = parser_with_options(settings=True).parse_known_args(["--run", "x", "--dr", "--data.limit=3"])
    assert not found.dry_run  # it may be the beginning of a setting
    assert rest == ["--dr", "--data.limit=3"]


@pytest.mark.parametrize("words", [["6", "7"], ["6,7"], ["[6,7]"], ["[6,", "7]"], ["6,", "7"], ["[6 7]"]])
def test_layers_are_written_as_one_likes(words: list[str]) -> None:
    assert read_layers(words) == [6, 7]
    assert full_settings(["--layers", *words, "--limit", "3"]) == [
        "--model.editor.init_args.layers=[6, 7]", "--data.limit=3",
    ]  # fmt: skip
    full = full_settings(["--model.editor.init_args.layers", *words, "--run_name", "x"])
    assert full == ["--model.editor.init_args.layers=[6, 7]", "--run_name", "x"]


@pytest.mark.parametrize("words", [["x"], ["6", "x"], ["[6,7"], ["6;7"], [""]])
def test_what_is_no_layer_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="expected numbers of layers"):
        read_layers(words)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (["--data", "f.csv"], ["--data.source=file", "--data.path=f.csv"]),
        (["--data=f.csv", "--data.source", "facts"], ["--data.path=f.csv", "--data.source", "facts"]),
        (["--data", "builtin"], ["--data.source=builtin", "--data.path=null"]),
        (["--data", "part.yaml"], ["--data=part.yaml"]),
        (["--model", "some.package.Network"], ["--model=some.package.Network"]),
        (["--model", "Qwen/Qwen2.5-7B"], ["--model.language_model.name=Qwen/Qwen2.5-7B"]),
        (["--limit", "3"], ["--data.limit=3"]),
        (["--model", "gpt2-xl"], ["--model.language_model.name=gpt2-xl"]),
        (["--model", "{a: 1}"], ["--model={a: 1}"]),
        (["--seed", "3"], ["--seed_everything=3"]),
        (["--out", "there/x"], ["--runs_dir=there", "--run_name=x"]),
        (["--run-name", "x-y", "--trainer.max-steps=3"], ["--run_name", "x-y", "--trainer.max_steps=3"]),
        (["--name", "x"], ["--run_name=x"]),
        (["--method", "FT-L"], ["--config", "method/ft_l"]),
        (["--method", "rome", "--config", "counterfact"], ["--config", "counterfact", "--config", "method/rome"]),
        (["--limit=3", "--config=counterfact", "--x"], ["--config=counterfact", "--data.limit=3", "--x"]),
        (["--model.editor.init_args.layers", "null"], ["--model.editor.init_args.layers=null"]),
    ],
)
def test_short_forms_stand_for_settings(short: list[str], full: list[str]) -> None:
    assert full_settings(short) == full
    assert full_settings(full) == full


@pytest.mark.parametrize("words", [["--limit"], ["--data", "--limit", "3"], ["--layers", "x"]])
def test_short_forms_without_a_value_are_refused(words: list[str]) -> None:
    with pytest.raises(ArgumentError, match=words[0]):
        full_settings(words)


def test_several_fits_are_given_files_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_with_options(settings=True)
    (tmp_path / "f.csv").write_text("")
    found = read_settings(parser, ["--data", str(tmp_path / "." / "f.csv"), "--limit=3", "--seed", "1"])
    assert found == {"data.source": "file", "data.path": f"{tmp_path}/f.csv", "data.limit": "3", "seed_everything": "1"}
    with pytest.raises(ArgumentError, match=r"--data gone\.csv: no such file"):
        read_settings(parser, ["--data", "gone.csv"])
    with pytest.raises(SystemExit):
        read_settings(parser, ["--limti", "3"])
    assert "did you mean --limit?" in capsys.readouterr().err.splitlines()[-1]


def test_fit_reads_short_forms_as_the_settings_that_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_edit.console.fit_parser import FitParser

    monkeypatch.chdir(tmp_path)
    parser = FitParser()
    said = "--method memit --data f.csv --limit 3 --layers 6 7 --model gpt2-xl --out there/x --config quickstart"
    full = (
        "--config quickstart --config method/memit --data.source file --data.path f.csv --runs_dir there "
        "--data.limit 3 --run_name x --model.editor.init_args.layers [6,7] --model.language_model.name gpt2-xl"
    )
    found, meant = parser.parse(said.split()), parser.parse(full.split())
    assert {**found, "config": None} == {**meant, "config": None}
    with pytest.raises(ArgumentError, match=r"did you mean --data\.limit\?"):
        parser.parse(["--config", "quickstart", "--data.limti", "3"])


def test_methods_have_the_names_that_people_use() -> None:
    assert method_config("MEMITSeq") == "method/memit_seq"
    assert method_config("method/rome") == "method/rome"
    with pytest.raises(ArgumentError, match=r"--method mine\.yaml: no such file"):
        method_config("mine.yaml")
