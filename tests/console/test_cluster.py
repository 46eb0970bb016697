"""The jobs in configs/cluster: parsed, made, run with a tiny model of their family. Also their script, and the docs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import yaml
from google.protobuf.message import DecodeError
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from safetensors import safe_open

from lit_edit import EditDataModule, EditStream
from lit_edit.cli.main import main
from lit_edit.console.configs import config_root, shipped_configs
from lit_edit.console.fit_parser import FitParser
from lit_edit.models.presets import PUBLISHED
from lit_edit.sweeps.grids import read_grid
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.conftest import ROOT
from tests.loggers.wandb_files import read_records
from tests.sweeps.test_sweep import run_script

JOBS = [name.removeprefix("cluster/") for name in shipped_configs() if name.startswith("cluster/")]
SIZES = {"llama3_8b": ("llama", 32, 4096), "qwen2_5_7b": ("qwen2", 28, 3584), "gptj_6b": ("gptj", 28, 4096)}
SCRIPT = config_root() / "cluster" / "slurm.sbatch"
every_job = pytest.mark.parametrize("job", JOBS)


def size_of(job: str) -> tuple[str, int, int]:
    """Model type, layers and width of a job's model."""
    return SIZES[job.rpartition("_")[0]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family, and two facts."""
    folder = tmp_path_factory.mktemp("cluster")
    for family, _, _ in SIZES.values():
        tiny_model(family).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    facts = [
        {
            "case_id": number,
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
            "target_true": request.target_true,
            "paraphrases": list(request.paraphrases),
            "neighborhood": [{"prompt": probe.prompt, "answer": probe.answer} for probe in request.neighborhood],
        }
        for number, request in enumerate(tiny_requests()[:2])
    ]
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def tiny_arguments(job: str, places: Path) -> list[str]:
    """The job on a tiny model of its family, on a CPU."""
    return [
        *("--config", f"cluster/{job}", "--model.language_model.name", str(places / size_of(job)[0])),
        *("--data.path", str(places / "facts.json"), "--trainer.accelerator=cpu", "--trainer.num_nodes=1"),
    ]


def wandb_run(folder: Path) -> Any:
    """What wandb was told of the run in a folder when it was begun."""
    import wandb

    wandb.finish()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(500):
        with suppress(DecodeError):  # wandb's service is still writing
            records = list(read_records(path))
            if any(record.HasField("exit") for record in records):
                return next(record.run for record in records if record.HasField("run"))
        sleep(0.02)
    raise AssertionError(f"{path} has no end")


def test_the_jobs_are_there() -> None:
    assert set(JOBS) == {f"{model}_{strategy}" for model in SIZES for strategy in ("ddp", "fsdp2")}


@every_job
def test_a_job_is_complete(job: str) -> None:
    settings = FitParser().parse(["--config", f"cluster/{job}", "--data.path", "counterfact.json"])
    arguments, trainer = settings["model"]["editor"]["init_args"], settings["trainer"]
    assert tuple(arguments["layers"]) == PUBLISHED[size_of(job)]
    assert arguments["covariance_weight"] == 15000
    assert settings["model"]["language_model"]["dtype"] == "bfloat16"
    nodes = {"ddp": 1, "fsdp2": 2}[job.rpartition("_")[2]]
    assert (trainer["accelerator"], trainer["devices"], trainer["num_nodes"]) == ("gpu", 8, nodes)
    assert trainer["strategy"] == job.rpartition("_")[2]
    usual = FitParser().parse(["--config", "counterfact"])["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in trainer["callbacks"]] == [
        callback["class_path"] for callback in usual
    ]
    wandb = trainer["logger"][1]["init_args"]
    assert (wandb["group"], wandb["id"], wandb["resume"], wandb["offline"]) == (job, None, "allow", False)


def test_both_jobs_of_a_model_differ_in_where_they_run_alone() -> None:
    for model in SIZES:
        one, other = (
            yaml.safe_load((config_root() / "cluster" / f"{model}_{strategy}.yaml").read_text())
            for strategy in ("ddp", "fsdp2")
        )
        for config in (one, other):
            del config["trainer"]["strategy"], config["trainer"]["num_nodes"]
            del config["trainer"]["logger"][1]["init_args"]["group"]
        assert one == other


@every_job
def test_everything_in_a_job_can_be_made(job: str, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    parser = FitParser()
    parser.parse([*tiny_arguments(job, places), "--trainer.devices=2"])
    made = parser.make()
    assert isinstance(made.model, EditStream)
    assert isinstance(made.data, EditDataModule)
    assert len(made.data.read().requests) == 2
    model, _ = made.model.language_model.load()
    assert (model.config.model_type, str(model.dtype)) == (size_of(job)[0], "torch.bfloat16")
    trainer = Trainer(**made.trainer)  # starts no process
    assert trainer.world_size == 2
    expected = DDPStrategy if job.endswith("ddp") else StrategyRegistry.get("fsdp2").__class__
    assert isinstance(trainer.strategy, expected)
    assert [type(logger).__name__ for logger in trainer.loggers] == ["RunCSVLogger", "RunWandbLogger"]
    assert not list(places.glob("runs*"))


@every_job
def test_a_job_edits_a_tiny_model(
    job: str, places: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    smaller = ["--trainer.devices=1", "--trainer.strategy=auto", "--model.editor.init_args.layers=[1,2]"]
    smaller += ["--model.statistics.tokens=0", "--run_name", job, "--resume", "auto"]
    assert main(["fit", *tiny_arguments(job, places), *smaller]) == 0
    run = tmp_path / "runs" / job
    begun = wandb_run(run)
    assert (begun.run_group, begun.run_id) == (job, (run / "wandb" / "run_id").read_text().strip())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["edits"] == 2
    with safe_open(run / "ledger" / "deltas.safetensors", "pt") as file:
        deltas = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert len(deltas) == 2
    assert all(delta.isfinite().all() and delta.abs().max() > 0 for delta in deltas)


def test_wandb_hears_of_the_first_process_alone(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = FitParser()
    parser.parse(tiny_arguments(JOBS[0], places))
    logger = parser.make().trainer.logger[1]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"b": 1})
    logger.experiment.log({"c": 1.0})
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


# ---- scripts ------------------------------------------------------------------------------------------------------


def options_of(script: Path) -> dict[str, str]:
    """The options in the head of a batch script; SLURM reads no further than the first command."""
    options = {}
    for line in script.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = value
    return options


def test_the_script_asks_for_what_the_job_needs() -> None:
    options = options_of(SCRIPT)
    trainer = FitParser().parse(["--config", "cluster/llama3_8b_ddp"])["trainer"]
    assert int(options["nodes"]) == trainer["num_nodes"]
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"]) == trainer["devices"]
    assert options["signal"] == "SIGUSR1@120"  # not B:SIGUSR1, which would reach the script alone
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"
    assert SCRIPT.read_text().count("#SBATCH ") == len(options) + 2  # two are commented out


def test_the_script_is_good_bash() -> None:
    subprocess.run(["/bin/bash", "-n", str(SCRIPT)], check=True)


@every_job
def test_the_script_starts_a_fit_that_parses(job: str, tmp_path: Path) -> None:
    nodes = "1" if job.endswith("ddp") else "2"
    variables = {"SLURM_JOB_NAME": "llama", "SLURM_JOB_NUM_NODES": nodes, "SLURM_NTASKS_PER_NODE": "8"}
    [words] = run_script(SCRIPT, tmp_path, f"cluster/{job}", "--data.path", "my facts.json", **variables)
    kill, cpus, program, command, *arguments = words
    assert (kill, cpus, program, command) == ("--kill-on-bad-exit=1", "--cpus-per-task=1", "lit-edit", "fit")
    settings = FitParser().parse(arguments)
    assert (settings["run_name"], settings["resume"], settings["data"]["path"]) == ("llama", "auto", "my facts.json")
    assert (settings["trainer"]["num_nodes"], int(settings["trainer"]["devices"])) == (int(nodes), 8)


def test_the_script_wants_a_config(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_script(SCRIPT, tmp_path, SLURM_JOB_NAME="x")
    assert "name a config" in error.value.stderr


# ---- docs/cluster.md ----------------------------------------------------------------------------------------------

TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.search(r"lit[-_]edit fit", line)])
def test_commands_parse(command: str) -> None:
    settings = FitParser().parse(shlex.split(re.split(r"lit[-_]edit fit", command)[1]))
    assert settings["model"]["editor"]["class_path"] == "lit_edit.editors.D4S"


@pytest.mark.parametrize("command", [line for line in COMMANDS if "lit-edit sweep" in line])
def test_sweep_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_edit.sweeps.points.run_points", lambda *args: ran.append(args) or 0)
    assert main(shlex.split(command)[1:]) == 0


def test_the_grid_is_one(tmp_path: Path) -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "grid.yaml").write_text(block)
    grid = read_grid(tmp_path / "grid.yaml")
    assert len(grid.points) == 2 * 3 * 2 * 2
    assert grid.points[-1].name == "memit+shuffle_seed=2+batch_size=10+three"
    parser = FitParser()
    for point in grid.points[::5]:
        parser.parse(grid.arguments(point.choices))


def test_torchrun_is_given_options_that_it_has() -> None:
    from torch.distributed.run import get_args_parser

    [command] = [line for line in COMMANDS if line.startswith("torchrun")]
    options = get_args_parser().parse_args(shlex.split(command)[1:])
    assert (options.nnodes, options.nproc_per_node, options.module) == ("2", "8", True)
    assert options.training_script == "lit_edit"
    assert options.training_script_args[0] == "fit"
