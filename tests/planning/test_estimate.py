"""Plans: formulas against tensors that are counted, sizes that are known, and what the command line says."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_edit.cli.main import HELP, main
from lit_edit.cli.plan import read_size
from lit_edit.editors import D4S, MEMIT
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models import LanguageModel, ModelAdapter, ModelUnavailableError
from lit_edit.models.known import KNOWN, find_architecture, make_meta_model
from lit_edit.planning.estimate import FOLD_EVERY, Item, Plan, Setup, Speed, make_plan, suggestions
from lit_edit.planning.sizes import ModelSizes
from lit_edit.planning.workload import Workload
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.storage import SolverStorage
from lit_edit.targets.contexts import PLAIN
from lit_edit.targets.optimize import TargetSettings
from lit_edit.targets.problem import build_problem
from lit_edit.targets.window import _CHUNK_TOKENS as CUT
from lit_edit.targets.window import Window
from lit_edit.testing import TINY_CONFIGS, tiny_model, tiny_requests, tiny_tokenizer

SPEED = Speed(rate=1e12, bandwidth=1e11)


def sizes_of(name: str = "meta-llama/Meta-Llama-3-8B", editor: D4S | None = None) -> ModelSizes:
    model = make_meta_model(find_architecture(LanguageModel(name)))
    return ModelSizes.of(ModelAdapter(model), editor or D4S())


def plan_of(sizes: ModelSizes, setup: Setup, editor: D4S | MEMIT | None = None) -> Plan:
    editor = editor or D4S()
    return make_plan(sizes, editor, setup, Workload.typical(5, editor.target), SPEED)


def item(plan: Plan, name: str) -> Item:
    return next(item for item in plan.items if item.name.startswith(name))


# ---- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        ("smollm2-135m", 134_515_008, (576, 1536)),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, (4096, 14336)),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496, (8192, 28672)),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, (4096, 11008)),
        ("Qwen/Qwen2.5-7B", 7_615_616_512, (3584, 18944)),
        ("EleutherAI/gpt-j-6b", 6_050_882_784, (4096, 16384)),  # its name is spelled both ways
        ("gpt2-xl", 1_557_611_200, (1600, 6400)),
    ],
)
def test_well_known_models_have_their_published_sizes(
    name: str, parameters: int, shape: tuple[int, int], own_cache: Path
) -> None:
    sizes = sizes_of(name)
    assert sizes.parameters == parameters
    assert set(sizes.shapes) == {shape}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_sizes_on_the_meta_device_are_those_of_the_model(name: str) -> None:
    real = tiny_model(name)
    editor = D4S(layers=[1, 2])
    sizes = ModelSizes.of(ModelAdapter(make_meta_model(real.config)), editor)
    assert sizes == ModelSizes.of(ModelAdapter(real), editor)
    assert sizes.parameters == sum(p.numel() for p in real.parameters())
    gates = name not in ("gpt2", "gptj", "gpt_neox", "opt")
    d_ff = sizes.shapes[0][1]
    assert sizes.kept == d_ff * (3 if gates else 4 if name in ("gpt2", "gptj") else 1)


def test_nothing_of_a_model_is_in_memory() -> None:
    model = make_meta_model(find_architecture(LanguageModel("meta-llama/Meta-Llama-3-70B")))
    assert {p.device.type for p in model.parameters()} == {"meta"}


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["float64", "float32"])
def test_solver_matrices_are_counted_as_the_solver_has_them(inverse: str) -> None:
    model = tiny_model()
    storage = SolverStorage(inverse=inverse)  # type: ignore[arg-type]
    editor = D4S(layers=[1, 2], storage=storage)
    adapter = ModelAdapter(model)
    sizes = ModelSizes.of(adapter, editor)
    plan = plan_of(sizes, Setup(torch.float32, storage=storage), editor)
    counted = dict.fromkeys(("prior", "P", "G", "update", "rest"), 0)
    for layer in editor.layers or ():
        d_out, d_in = adapter.shape(layer)
        solver = RidgeSolver(torch.eye(d_in), d_out, storage=storage, drift_bound=1.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2 * FOLD_EVERY - 1):
            solver.update(torch.randn(d_in, 1, generator=generator), torch.randn(d_out, 1, generator=generator))
        state = solver.state_dict()
        sized = {name: value.nbytes for name, value in state.items() if isinstance(value, torch.Tensor)}
        counted["prior"] += solver._prior.nbytes
        counted["P"] += sized.pop("inverse")
        counted["G"] += sized.pop("gram")
        counted["update"] += sized.pop("delta")
        counted["rest"] += sum(sized.values()) - sized["signs"]
    assert solver._columns[0].shape[1] == FOLD_EVERY - 1
    assert item(plan, "statistics: prior").first == counted["prior"]
    assert item(plan, "statistics: P").first == counted["P"]
    assert item(plan, "statistics: G").first == counted["G"]
    assert item(plan, "solution: the update").first == counted["update"]
    assert item(plan, "solution: A").first == pytest.approx(counted["rest"], rel=0.05)  # a column short of full


def test_weights_and_original_values_are_counted_as_the_ledger_has_them() -> None:
    model = tiny_model("gpt2", torch.bfloat16)
    adapter, editor = ModelAdapter(model), D4S(layers=[1, 2])
    plan = plan_of(ModelSizes.of(adapter, editor), Setup(torch.bfloat16), editor)
    ledger = EditLedger(adapter, (1, 2))
    assert item(plan, "weights").first == sum(p.nbytes for p in model.parameters())
    assert item(plan, "edited layers").first == 2 * sum(base.nbytes for base in ledger.base.values())


def test_short_streams_fold_nothing_and_memit_remembers_nothing() -> None:
    sizes = sizes_of()
    names = [i.name for i in plan_of(sizes, Setup(torch.float32, edits=FOLD_EVERY - 1)).items]
    assert "statistics: G" not in names
    assert "statistics: G" in [i.name for i in plan_of(sizes, Setup(torch.float32, edits=FOLD_EVERY)).items]
    assert "statistics: G" not in [i.name for i in plan_of(sizes, Setup(torch.float32), MEMIT()).items]


def test_only_the_largest_of_what_comes_and_goes_counts() -> None:
    items = (Item("a", 1, 2), Item("b", 10, 0, passing=True), Item("c", 7, 3, passing=True), Item("d", 5, 5, "host"))
    plan = Plan(items, (), ())
    assert (plan.total(), plan.total(first=False), plan.total("host"), plan.peak) == (11, 5, 5, 11)


def test_ddp_keeps_the_solver_on_rank_0_and_the_model_everywhere() -> None:
    sizes = sizes_of()
    plan = plan_of(sizes, Setup(torch.bfloat16, devices=2, strategy="ddp", gpu=True))
    for name in ("prior", "P", "G"):
        assert item(plan, f"statistics: {name}").first == 5 * 8 * 14336**2
        assert item(plan, f"statistics: {name}").others == 0
    assert item(plan, "weights").first == item(plan, "weights").others == 2 * sizes.parameters
    assert item(plan, "solution: the update").others == 5 * 8 * 4096 * 14336


def test_fsdp2_cuts_the_layers_and_not_the_head() -> None:
    sizes = sizes_of()
    setups = [Setup(torch.bfloat16, devices=n, strategy="fsdp2", gpu=True) for n in (2, 8)]
    rest = 2 * (sizes.parameters - sum(sizes.layers))
    for setup in setups:
        weights = item(plan_of(sizes, setup), "weights")
        assert weights.first == weights.others == rest + 2 * sum(sizes.layers) / setup.devices
    assert rest > 2 * 2 * 128256 * 4096  # embeddings and head are not tied
    gathered = item(plan_of(sizes, setups[0]), "layers gathered")
    assert gathered.first == 2 * 2 * sizes.layers[0]


def test_offloading_moves_the_solver_to_the_host_and_its_sums_to_disk() -> None:
    sizes, square = sizes_of(), 5 * 8 * 14336**2
    setup = Setup(torch.bfloat16, gpu=True)
    none, cpu, disk = (
        plan_of(sizes, replace(setup, storage=SolverStorage(offload=place)))  # type: ignore[arg-type]
        for place in ("none", "cpu", "disk")
    )
    assert none.total("disk") == 0
    assert none.total() - cpu.total() > square
    assert cpu.total("host") - none.total("host") >= 3 * square - 2 * sizes.parameters
    assert disk.total("disk") == 2 * square
    assert disk.total() == cpu.total()


def test_every_suggestion_is_another_setup_and_needs_no_more() -> None:
    sizes, setup = sizes_of(), Setup(torch.float32, devices=2, strategy="ddp", gpu=True)
    found = suggestions(setup)
    assert len(found) == 5
    before = plan_of(sizes, setup).peak
    assert all(other != setup and plan_of(sizes, other).peak <= before for other in found.values())
    lean = replace(found["--strategy fsdp2"], dtype=torch.bfloat16, window=8, storage=SolverStorage("float32", "cpu"))
    assert not suggestions(lean)


# ---- time ---------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_window_are_those_that_are_run() -> None:
    tokenizer, requests = tiny_tokenizer(), tiny_requests()
    work = Workload.of(tokenizer, requests, 0, TargetSettings())
    adapter = ModelAdapter(tiny_model())
    problems = [build_problem(tokenizer, request, PLAIN) for request in requests]
    window = Window(adapter, problems, 1, adapter.n_layers, 0)
    chunks = window.chunks(range(len(problems)))
    assert work.counted
    assert sum(len(chunk.line) for chunk in chunks) == pytest.approx(len(problems) * work.own)
    assert sum(len(c.read) + len(c.essence) for c in chunks) == pytest.approx(len(problems) * work.read)
    assert len(window.before or []) == pytest.approx(len(problems) * work.shared)


def test_chunks_are_of_the_size_that_the_engine_cuts() -> None:
    from lit_edit.planning.estimate import CHUNK_TOKENS

    assert CHUNK_TOKENS == CUT


def test_time_falls_with_devices_and_rate_and_grows_with_the_model() -> None:
    small, large = sizes_of(), sizes_of("meta-llama/Meta-Llama-3-70B")
    one = Setup(torch.float32)
    seconds = plan_of(small, one).seconds
    assert plan_of(large, one).seconds > 5 * seconds
    assert plan_of(small, replace(one, devices=2, strategy="ddp")).seconds < 0.7 * seconds
    work = Workload.typical(5, D4S().target)
    assert make_plan(small, D4S(), one, work, replace(SPEED, rate=2e12)).seconds < 0.7 * seconds
    fewer = Workload.typical(2, D4S().target)
    assert make_plan(small, D4S(), one, fewer, SPEED).seconds < 0.7 * seconds


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def bare_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder without weights."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    return bare


def test_a_plan_needs_no_weights_and_leaves_nothing_behind(
    bare_folder: Path,
    tmp_path: Path,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    args = ["plan", "--config", "quickstart", f"--model.language_model.name={bare_folder}", "--data.limit", "5"]
    args += ["--model.editor.init_args.layers=[1,2]", "--trainer.accelerator=cpu", "--json", "plan.json"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "D4S on layers 1, 2; 1 device" in out.replace("\n", " ")
    assert "in all, at most" in out
    assert "counted in the edits of this config" in out.replace("\n", " ")
    assert max(map(len, out.splitlines())) <= 80
    assert [path.name for path in place.iterdir()] == ["plan.json"]
    written = json.loads((place / "plan.json").read_text())
    assert written["setup"]["edits"] == 5
    assert written["bytes"]["device"]["first"] == sum(i["first"] for i in written["items"] if not i["passing"]) + max(
        i["first"] for i in written["items"] if i["passing"]
    )
    assert written["seconds_per_edit"] > 0


def llama(*args: str) -> int:
    name = "--model.language_model.name=meta-llama/Meta-Llama-3-8B"
    return main(["plan", "--config", "quickstart", name, "--tflops=400", *args])


def test_a_plan_says_what_helps_where_it_does_not_fit(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama("--device-memory", "24GB", "--devices", "2") == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "--model.language_model.dtype bfloat16: " in out
    assert "--strategy fsdp2: " in out
    assert "storage.inverse float32: " in out
    assert llama("--device-memory", "200GB", "--model.language_model.dtype", "bfloat16") == 0
    assert "It fits: " in capsys.readouterr().out


def test_devices_and_strategy_come_from_the_trainer_or_the_options(
    own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert llama("--json", str(file), "--devices", "4", "--nodes", "2", "--strategy", "fsdp2") == 0
    setup = json.loads(file.read_text())["setup"]
    assert (setup["devices"], setup["strategy"], setup["gpu"]) == (8, "fsdp2", True)
    assert "8 devices (fsdp2)" in capsys.readouterr().out.replace("\n", " ")
    assert llama("--json", str(file), "--devices", "2") == 0
    assert json.loads(file.read_text())["setup"]["strategy"] == "ddp"


def test_a_plan_for_programs(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama("--json") == 0
    assert json.loads(capsys.readouterr().out)["setup"]["devices"] == 1


def test_precision_of_the_trainer_counts(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert llama("--config", "trainer/bf16", f"--json={file}") == 0
    assert json.loads(file.read_text())["setup"]["dtype"] == "bfloat16"


def test_a_config_file_stands_in_for_a_model(bare_folder: Path, own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    args = ["plan", "--config=quickstart", "--model.language_model.name=none/such", f"--json={file}", "--tflops=1"]
    assert main([*args, f"--model-config={bare_folder / 'config.json'}"]) == 0
    assert json.loads(file.read_text())["sizes"]["d_model"] == 32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.language_model.name=none/such"], "--model-config FILE"),
        (["--model.language_model.name=nonsense"], "there is no model 'nonsense'"),
        (["--model.nonsense=1"], "nonsense"),
        (["--config", "nonsense"], "--config nonsense: no such file"),
        (["--model.editor.init_args.layers=[99]"], "layer 99 does not exist"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    args: list[str], message: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config=quickstart", "--tflops=1", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU to be measured")
def test_a_gpu_that_is_not_here_cannot_be_measured(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config=quickstart", "--accelerator=gpu"]) == 2
    assert "--tflops" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--tflops=0", "--tflops=x", "--utilisation=1.5", "--devices=0", "--device-memory=much", "--link=-1"]
)
def test_bad_options_are_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", option])
    assert stop.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  plan " in HELP
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    assert "--device-memory" in capsys.readouterr().out


def test_amounts_of_memory() -> None:
    assert read_size("80GB") == read_size("80") == read_size("0.08T") == 80e9
    assert read_size("1GiB") == 2.0**30
    with pytest.raises(argparse.ArgumentTypeError):
        read_size("0")


def test_an_architecture_that_is_nowhere_is_an_error_that_says_what_to_do(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelUnavailableError, match=r"no config\.json can be read"):
        find_architecture(LanguageModel(str(tmp_path)))
    with pytest.raises(ModelUnavailableError, match="meta-llama/Meta-Llama-3-8B"):
        find_architecture(LanguageModel("nonsense"))
    assert {name.lower() for name in KNOWN} >= {"eleutherai/gpt-j-6b", "qwen/qwen2.5-7b"}
