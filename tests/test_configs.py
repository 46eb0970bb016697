"""Every config that ships parses against the real signatures; interpolation and overrides work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lit_edit.cli.main import main
from lit_edit.console.configs import config_root, find_config, shipped_configs
from lit_edit.console.words import expand_arguments
from lit_edit.errors import ArgumentError
from lit_edit.stream.edit_stream import EditStream

# tests/sweeps/test_sweep.py, tests/sweeps/test_compare.py and tests/studies/test_mqd.py
SWEEPS = [name for name in shipped_configs() if name.startswith(("sweep/", "studies/")) or name == "compare"]
CLUSTER = [name for name in shipped_configs() if name.startswith("cluster/")]  # tests/console/test_cluster.py
NETWORKS = [name for name in shipped_configs() if name.startswith("train/")]
PUBLISHED = [name for name in shipped_configs() if name.startswith("published/")]
RUNS = [name for name in shipped_configs() if name not in SWEEPS + CLUSTER + PUBLISHED + NETWORKS]
PIECES = [name for name in RUNS if "/" in name and not name.startswith("experiment/")]
COMPLETE = [name for name in RUNS if name not in PIECES]


def parsed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_tree_is_there() -> None:
    folders = {name.partition("/")[0] for name in shipped_configs() if "/" in name}
    kinds = "model method published data trainer callbacks logger experiment sweep cluster studies train"
    assert folders == set(kinds.split())
    assert {"quickstart", "counterfact", "zsre"} <= set(COMPLETE)


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_configs_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "--config", name)
    assert config["model"]["language_model"]["name"] == "smollm2-135m"
    assert len(config["trainer"]["callbacks"]) == 10


@pytest.mark.parametrize("name", PIECES)
def test_pieces_parse_on_top_of_the_quickstart_and_change_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "--config", "quickstart", "--config", name)
    piece = yaml.safe_load((config_root() / f"{name}.yaml").read_text())
    for section, values in piece.items():
        for key, value in values.items():
            if not isinstance(value, (dict, list)):
                assert config[section][key] == value


@pytest.fixture(scope="module")
def stream_parser() -> ArgumentParser:
    """Of what a published config sets: made once, which takes longest."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EditStream, "model")
    return parser


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_make_an_editor(name: str, stream_parser: ArgumentParser) -> None:
    piece = yaml.safe_load((config_root() / f"{name}.yaml").read_text())
    assert set(piece) == {"model"}
    stream = stream_parser.instantiate_classes(stream_parser.parse_object(piece)).model
    _, model, method = name.split("/")
    same = yaml.safe_load((config_root() / f"method/{method}.yaml").read_text())["model"]["editor"]["class_path"]
    assert f"lit_edit.editors.{type(stream.editor).__name__}" == same
    depth = {"gpt2_xl": 48, "gptj_6b": 28, "llama2_7b": 32, "llama3_8b": 32}[model]
    layers = getattr(stream.editor, "layers", None) or (stream.editor.layer,)
    assert max(layers) < depth


def test_full_adds_the_protocol_to_the_default_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "--config", "counterfact", "--config", "callbacks/full")
    full = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]  # type: ignore[index]
    usual = yaml.safe_load((config_root() / "callbacks/default.yaml").read_text())["trainer"]["callbacks"]
    added = ["MEPerplexity", "ProtocolMetrics"]
    assert [name for name in full if name not in added] == [c["class_path"].rpartition(".")[2] for c in usual]
    assert all(full.index(name) < full.index("RunFolder") for name in added)  # which writes what they measure


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_configured_by_classes_of_their_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "--config", name, "--data.limit=7")
    assert config["train"] == "network"
    assert config["model"]["class_path"].startswith("lit_edit.training.")
    assert config["data"]["init_args"]["limit"] == 7


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_says_how_to_run_it(name: str) -> None:
    text = (config_root() / f"{name}.yaml").read_text()
    header = text[: text.index("\n\n")] if name in COMPLETE + CLUSTER + NETWORKS else text
    assert header.startswith("# ")
    assert "--config" in header or "--trainer.logger" in header


def test_interpolation_is_resolved_within_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (config_root() / "quickstart.yaml").read_text().replace("seed_everything: 0", "seed_everything: 41")
    own = tmp_path / "own.yaml"
    own.write_text(text)
    config = parsed(capsys, "--config", str(own))
    assert config["model"]["editor"]["init_args"]["seed"] == 41
    assert config["model"]["statistics"]["seed"] == 41


@pytest.mark.parametrize("words", [["--seed_everything=7"], ["--seed_everything", "7"]])
def test_a_seed_on_the_command_line_reaches_what_refers_to_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = parsed(capsys, "--config", "counterfact", *words)
    assert config["seed_everything"] == 7
    assert config["model"]["editor"]["init_args"]["seed"] == 7
    assert config["model"]["statistics"]["seed"] == 7


def test_values_are_overridden_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(
        capsys,
        "--config=quickstart",
        "--model.editor.init_args.covariance_weight=77",
        "--model.editor.init_args.target.steps=3",
        "--data.limit=5",
        "--trainer.max_steps=4",
    )
    arguments = config["model"]["editor"]["init_args"]
    assert (arguments["covariance_weight"], arguments["target"]["steps"], arguments["seed"]) == (77, 3, 0)
    assert (config["data"]["limit"], config["trainer"]["max_steps"]) == (5, 4)


def test_the_method_can_be_changed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "--config", "quickstart", "--config", "method/d4s_paper")
    assert config["model"]["editor"]["init_args"]["residual"] == "shared"
    config = parsed(capsys, "--config", "quickstart", "--config", "method/memit")
    assert config["model"]["editor"]["class_path"] == "lit_edit.editors.MEMIT"


@pytest.mark.parametrize("arguments", [["--trainer.logger", "wandb"], ["--trainer.logger=wandb"]])
def test_loggers_by_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "--config", "quickstart", *arguments)
    kinds = [logger["class_path"].rpartition(".")[2] for logger in config["trainer"]["logger"]]
    assert kinds == ["RunCSVLogger", "RunWandbLogger"]


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == str(config_root() / "quickstart.yaml")
    (tmp_path / "quickstart").write_text("{}")
    assert find_config("quickstart") == "quickstart"


def test_unknown_configs_are_named_with_what_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"--config nonsense: no such file.*lit-edit models lists them"):
        expand_arguments(["--config", "nonsense"])


def test_names_cannot_leave_the_folder() -> None:
    with pytest.raises(ArgumentError):
        find_config("../pyproject")
