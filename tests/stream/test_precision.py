"""Precision: passes of the model are rounded as the Trainer says, algebra never is; devices without float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM

from lit_edit import EditStream, KeyStatistics, LanguageModel
from lit_edit.cli.main import main
from lit_edit.devices import algebra
from lit_edit.devices.algebra import algebra_device, algebra_dtype, for_algebra, outside_autocast, supports_float64
from lit_edit.editors import Proposal
from lit_edit.editors.closed_form.key_index import KeyIndex
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate
from lit_edit.metrics.evaluation import evaluate_edits, measure_perplexity
from lit_edit.models import ModelAdapter
from lit_edit.runs.folder import open_for_change, open_run
from lit_edit.solvers import functional
from lit_edit.solvers.functional import ridge_update
from lit_edit.solvers.recursive_least_squares import Block, RidgeSolver
from lit_edit.solvers.storage import SolverStorage
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.remote_device import DEVICE, RemoteDevice
from tests.streams import FixedStatistics, make_data, make_stream, make_trainer, state_of

# The exact bits, and type and device.
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
SINGLE = SolverStorage(inverse="float32")
storages = pytest.mark.parametrize("storage", [SolverStorage(), SINGLE], ids=["float64", "float32"])
PASSES = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "16-true": torch.float16}  # the weights' types
low_precisions = pytest.mark.parametrize("precision", list(PASSES))


def fit(folder: Path, precision: str, stream: EditStream | None = None, **options: Any) -> EditStream:
    stream = make_stream() if stream is None else stream
    data = options.pop("data", None) or make_data()
    make_trainer(folder, options.pop("callbacks", None), precision=precision).fit(stream, data, **options)
    return stream


def unedited(stream: EditStream, model_type: str = "llama") -> dict[str, Tensor]:
    """The edited weights as they were, in the type that the stream's model has."""
    own = tiny_model(model_type).to(stream.adapter.dtype).state_dict()
    return {name: own[name] for name in stream.ledger.names.values()}


def facts_of(stream: EditStream, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and residuals of all edits, as the journal has them."""
    numbers = [entry.number for entry in stream.ledger.entries]
    recorded = [r.tensors for r in stream.ledger.facts_of(numbers)]
    keys, residuals = ([t[f"{part}.{layer}"] for t in recorded] for part in ("keys", "residuals"))
    assert {value.dtype for value in (*keys, *residuals)} == {torch.float64}
    return torch.cat(keys, 1), torch.cat(residuals, 1)


# ---- bf16-true and bf16-mixed: algebra keeps its type ----------------------------------------------------------------


class _Watch(Callback):
    """Looks at the weights after every commit, and at what a step's passes are made in."""

    def __init__(self) -> None:
        self.defaults: set[torch.dtype] = set()
        self.outputs: set[torch.dtype] = set()
        self.wrong: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.original = unedited(pl_module)

        def after(module: Any, args: Any, output: Tensor) -> None:
            self.defaults.add(torch.get_default_dtype())
            self.outputs.add(output.dtype)

        self.hook = pl_module.adapter.down_proj(0).register_forward_hook(after)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for layer, name in pl_module.ledger.names.items():
            exact = self.original[name].double() + pl_module.editor.solvers[layer].delta
            if not torch.equal(pl_module.adapter.own_weight(layer), exact.to(self.original[name].dtype)):
                self.wrong.append(f"{name} after {len(pl_module.ledger)} edits")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.hook.remove()


@low_precisions
@storages
def test_statistics_and_updates_keep_their_type(tmp_path: Path, precision: str, storage: SolverStorage) -> None:
    watch, stream = _Watch(), make_stream(storage=storage)
    fit(tmp_path, precision, stream, callbacks=[watch])
    half = torch.float16 if precision == "16-true" else torch.bfloat16
    assert half in watch.outputs  # the setting does something
    assert (half in watch.defaults) == precision.endswith("true")
    assert watch.wrong == []
    assert {value.dtype for value in stream.ledger.deltas.values()} == {torch.float64}
    assert stream.editor.known is not None
    assert stream.editor.known.state_dict()["sketches"].dtype == torch.float32
    for layer, solver in stream.editor.solvers.items():
        assert isinstance(solver, RidgeSolver)
        assert stream.adapter.own_weight(layer).dtype == PASSES[precision]
        state = {name: value for name, value in solver.state_dict().items() if isinstance(value, Tensor)}
        assert {value.dtype for value in state.values()} == {torch.float64}
        assert {solver.gram.dtype, solver.cross.dtype} == {torch.float64}
        assert solver._inverse.dtype == storage.inverse_dtype


@low_precisions
@storages
def test_an_edit_is_solved_as_exactly_as_without(tmp_path: Path, precision: str, storage: SolverStorage) -> None:
    """Products in bfloat16 would be wrong in the third digit."""
    stream = fit(tmp_path, precision, make_stream(storage=storage))
    for layer, solver in stream.editor.solvers.items():
        prior = 5.0 * torch.eye(solver.d_in, dtype=torch.float64)
        expected = ridge_update(*facts_of(stream, layer), prior)
        error = float((solver.delta - expected).norm() / expected.norm())
        assert error < (1e-12 if storage is not SINGLE else 1e-5), f"layer {layer}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_keys_are_double_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter, tokenizer = ModelAdapter(tiny_model(dtype=dtype)), tiny_tokenizer()
    texts = [f"{r.text} {r.target_new}, as {r.subject} is known for it." for r in tiny_requests()] * 12
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    statistics = KeyStatistics(corpus=str(tmp_path / "texts.txt"), cache=str(tmp_path / "cache"), tokens=1000)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does
    moment = statistics.compute(adapter, tokenizer, [1])[1]
    torch.set_default_dtype(torch.float32)
    total, count = torch.zeros(moment.shape, dtype=torch.float64), 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        keys = adapter.read_keys(ids, torch.ones_like(ids), [1])[1][0].double()
        total, count = total + keys.T @ keys, count + len(keys)
    assert moment.dtype == torch.float64
    # The same text, one row at a time: what differs is the rounding of passes, of which there are many.
    error = float((moment - total / count).norm() / moment.norm())
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
    lowest = float(torch.linalg.eigvalsh(moment).min())
    assert lowest > -1e-12 * float(moment.trace())  # a matrix that is rounded afterwards is none of squares


# ---- bf16-true -------------------------------------------------------------------------------------------------------


class _Cut(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(pl_module.ledger) == 4:
            raise RuntimeError("power cut")


@low_precisions
def test_a_cut_run_resumes_bit_for_bit(tmp_path: Path, precision: str) -> None:
    whole = fit(tmp_path / "whole", precision)
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", precision, callbacks=[saver, _Cut()])
    path = tmp_path / "checkpoints" / "epoch=0-step=3.ckpt"
    resumed = fit(tmp_path / "resumed", precision, ckpt_path=str(path), weights_only=True)
    left, right = state_of(whole), state_of(resumed)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert resumed.results == whole.results


@low_precisions
def test_a_checkpoint_is_measured_with_the_weights_it_was_saved_with(tmp_path: Path, precision: str) -> None:
    """Loaded into float32 weights and cast afterwards they would be rounded twice."""
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=6)
    stream = fit(tmp_path, precision, callbacks=[saver])
    (path,) = (tmp_path / "checkpoints").iterdir()
    fresh = make_stream()
    trainer = make_trainer(tmp_path / "measured", precision=precision)
    trainer.validate(fresh, make_data(), ckpt_path=str(path), weights_only=True)
    left, right = (s.model.state_dict() for s in (stream, fresh) if s.model is not None)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@storages
@pytest.mark.parametrize("keys", ["walked", "base"])
@low_precisions
def test_taking_all_edits_out_restores_the_weights(
    tmp_path: Path, precision: str, keys: str, storage: SolverStorage
) -> None:
    """Bit for bit, though down-dating leaves rounding behind: with ``P`` in float32, more than float32 weights have."""
    stream = fit(tmp_path, precision, make_stream(keys=keys, storage=storage), data=make_data(3))
    original = unedited(stream)
    changed = [n for n, layer in _weights(stream).items() if not torch.equal(layer, original[n])]
    assert changed == list(original)
    stream.session.undo([entry.number for entry in stream.ledger.entries])
    for name, weight in _weights(stream).items():
        torch.testing.assert_close(weight, original[name], **EXACT)


def _weights(stream: EditStream) -> dict[str, Tensor]:
    return {name: stream.adapter.own_weight(layer).detach() for layer, name in stream.ledger.names.items()}


def test_a_bf16_true_model_is_the_one_that_is_loaded_in_bfloat16(tmp_path: Path, tiny_folder: Path) -> None:
    """Lightning casts what transformers keeps in float32: the frequencies of rotary positions."""
    base = make_stream()
    stream = EditStream(LanguageModel(str(tiny_folder)), base.editor, base.statistics)
    fit(tmp_path, "bf16-true", stream)
    assert stream.model is not None
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    loaded.load_state_dict(stream.model.state_dict())
    assert [name for name, b in loaded.named_buffers() if b.dtype != stream.model.get_buffer(name).dtype] == []
    ids = torch.arange(3, 120)[None]
    torch.testing.assert_close(stream.model(ids).logits, loaded(ids).logits, **EXACT)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@low_precisions
def test_a_run_is_opened_with_the_weights_it_was_made_with(
    tmp_path: Path, tiny_folder: Path, own_cache: Path, precision: str
) -> None:
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", "--data.limit=2"]
    args += ["--model.editor.init_args.layers=[1,2]", "--model.editor.init_args.target.steps=4"]
    args += ["--model.editor.init_args.contexts=plain", "--model.statistics.tokens=0", "--trainer.accelerator=cpu"]
    assert main([*args, f"--trainer.precision={precision}", f"--runs_dir={tmp_path}", "--run_name=x"]) == 0
    run = open_run(tmp_path / "x")
    run.apply()
    original = tiny_model().to(PASSES[precision]).state_dict()
    for layer, name in run.ledger.names.items():
        weight = run.ledger.adapter.own_weight(layer).detach()
        exact = original[name].double() + run.ledger.deltas[name]
        torch.testing.assert_close(weight, exact.to(PASSES[precision]), **EXACT)
    with open_for_change(tmp_path / "x") as opened:
        for name, weight in _weights(opened.stream).items():
            torch.testing.assert_close(weight, run.ledger.adapter.model.get_parameter(name).detach(), **EXACT)
        opened.session.undo([1, 2])
        for name, weight in _weights(opened.stream).items():
            torch.testing.assert_close(weight, original[name], **EXACT)


# ---- bf16-mixed: passes in autocast, algebra never -------------------------------------------------------------------


def make_facts(count: int, seed: int = 0, d_in: int = 12, d_out: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_in, count, generator=generator), torch.randn(d_out, count, generator=generator)


def _use_solver(storage: SolverStorage, memory: bool) -> list[Any]:
    """All that a solver does: folds, removals, exchanges, factorisations."""
    solver = RidgeSolver(2.0 * torch.eye(12), 5, memory=memory, fold_every=3, storage=storage)
    for seed in range(5):
        solver.update(*make_facts(1, seed))
    found: list[Any] = [*solver.alone(make_facts(2, 9)[0]), solver.drift()]
    if memory:
        solver.absorb(solver.preview_removal(*make_facts(1, 4)))
        found += [solver.delta, solver.inverse, solver.gram, solver.cross]
        strong = (500 * make_facts(1, 6)[0], make_facts(1, 6)[1])  # taking it out leaves few digits
        solver.update(*strong)
        step = solver.preview_removal(*strong)
        assert step.anew is not None
        solver.absorb(step)
        solver.refactorise()
    else:
        solver.absorb(solver.preview_exchange([Block(*make_facts(1, 4))], [Block(*make_facts(1, 8))]))
    return [*found, solver.delta, solver.gram, solver.cross, solver.inverse]


@pytest.mark.parametrize("case", ["float64", "float32", "a CPU without float64"])
@pytest.mark.parametrize("memory", [True, False])
def test_solvers_compute_the_same_inside_autocast(monkeypatch: pytest.MonkeyPatch, case: str, memory: bool) -> None:
    storage = SINGLE if case == "float32" else SolverStorage()
    if case.startswith("a CPU"):
        monkeypatch.setattr(algebra, "supports_float64", lambda kind: False)
    expected = _use_solver(storage, memory)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(_use_solver(storage, memory), expected, **EXACT)


@pytest.mark.parametrize(
    "formula",
    [
        lambda keys, residuals, eye: functional.ridge_update(keys, residuals, eye),
        lambda keys, residuals, eye: functional.ridge_gain(0.1 * keys, keys),
        lambda keys, residuals, eye: functional.removal_gain(0.001 * keys, keys, 1e-6),
    ],
    ids=["ridge_update", "ridge_gain", "removal_gain"],
)
def test_formulas_compute_the_same_inside_autocast(formula: Callable[..., Any]) -> None:
    facts = *make_facts(3), torch.eye(12)
    expected = formula(*facts)
    assert expected is not None
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(formula(*facts), expected, **EXACT)


def test_keys_are_compared_the_same_inside_autocast() -> None:
    def nearest() -> list[tuple[int, float]]:
        index = KeyIndex(12)
        index.add([1, 2, 3], make_facts(3)[0])
        return index.nearest(make_facts(3)[0][:, 1])

    expected = nearest()
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest() == expected


def test_autocast_goes_on_behind_a_formula() -> None:
    ones = torch.ones(2, 2)

    @outside_autocast
    def product(left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    with torch.autocast("cpu", torch.bfloat16):
        assert product(ones, right=ones).dtype == torch.float32
        assert (ones @ ones).dtype == torch.bfloat16


def test_key_statistics_are_kept_for_every_precision(tmp_path: Path) -> None:
    """The cache does not know about autocast: what is in it must not depend on it."""
    (tmp_path / "texts.txt").write_text("\n".join(f"{r.text} {r.target_new}." for r in tiny_requests() * 8))
    adapter, found = ModelAdapter(tiny_model()), []
    for name, autocast in (("a", True), ("b", False)):
        statistics = KeyStatistics(corpus=str(tmp_path / "texts.txt"), cache=str(tmp_path / name))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(statistics.compute(adapter, tiny_tokenizer(), [1])[1])
    torch.testing.assert_close(*found, **EXACT)


@low_precisions
def test_a_model_that_does_not_change_is_measured_the_same_at_every_stage(tmp_path: Path, precision: str) -> None:
    """Lightning opens autocast for steps alone: before and after them the same model would say something else."""
    stream, data = make_stream(covariance_weight=1e12), make_data(1)
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(stream, data)
    original = unedited(stream)
    assert [n for n, weight in _weights(stream).items() if not torch.equal(weight, original[n])] == []
    assert stream.results["base"] == stream.results["immediate"] == stream.results["final"]
    assert stream.perplexities["base"] == stream.perplexities["final"]
    (measured,) = trainer.validate(stream, data)
    assert measured["validate/perplexity"] == pytest.approx(stream.perplexities["final"]["mean"], rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        results = evaluate_edits(stream.adapter, stream.tokenizer, data.requests)
        assert {r.id: r for r in results} == stream.results["final"]
        perplexity = measure_perplexity(stream.adapter, stream.tokenizer, data.perplexity_texts)
        assert perplexity == stream.perplexities["final"]


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_does_not_see_old_weights_after_a_commit(frozen: bool) -> None:
    """Autocast keeps casts of weights that want a gradient until it ends; Lightning's does not, a user's own does."""
    model = tiny_model().requires_grad_(not frozen)
    ledger = EditLedger(ModelAdapter(model), [1])
    name, ids = ledger.names[1], torch.arange(3, 20)[None]
    delta = torch.randn(ledger.adapter.shape(1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def fresh(weights: ModelAdapter) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return weights.last_hidden(ids, torch.ones_like(ids))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = ledger.adapter.last_hidden(ids, torch.ones_like(ids))
        ledger.commit([LayerUpdate(1, name, delta)], [])
        after = ledger.adapter.last_hidden(ids, torch.ones_like(ids))
        original = ledger.original().last_hidden(ids, torch.ones_like(ids))
        ledger.commit([LayerUpdate(1, name, 2 * delta)], [])
        again = ledger.adapter.last_hidden(ids, torch.ones_like(ids))
    torch.testing.assert_close(original, before, **EXACT)
    torch.testing.assert_close(again, fresh(ledger.adapter), **EXACT)
    once = ledger.adapter.with_weights({name: ledger.edited_weight(1, delta)})
    torch.testing.assert_close(after, fresh(once), **EXACT)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "gpt_neox", "opt", "gemma2", "phi3"])
def test_families_can_be_edited_in_autocast(tmp_path: Path, model_type: str) -> None:
    stream = fit(tmp_path, "bf16-mixed", make_stream(model_type), data=make_data(2))
    original = unedited(stream, model_type)
    for layer, name in stream.ledger.names.items():
        exact = original[name].double() + stream.adapter.to_layout(layer, stream.ledger.deltas[name])
        torch.testing.assert_close(stream.adapter.own_weight(layer).detach(), exact.float(), **EXACT)
        assert not torch.equal(stream.adapter.own_weight(layer), original[name])


# ---- refused ---------------------------------------------------------------------------------------------------------


def _plugin(kind: type, **attributes: Any) -> Any:
    """A plugin whose package need not be installed."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("16-mixed", "trainer.precision=16-mixed scales the gradients of an optimizer, .*: use 32"),
        (_plugin(TransformerEnginePrecision, precision="transformer-engine"), "transformer-engine .* in 8 bits"),
        (_plugin(BitsandbytesPrecision), "BitsandbytesPrecision quantises the weights"),
    ],
    ids=["16-mixed", "transformer-engine", "bitsandbytes"],
)
def test_what_edits_cannot_be_made_in_is_refused(tmp_path: Path, plugin: Any, message: str) -> None:
    trainer, stream = make_trainer(tmp_path), make_stream()
    if isinstance(plugin, str):
        trainer.precision_plugin.precision = plugin
    else:
        trainer.strategy._precision_plugin = plugin
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(stream, make_data())
    assert stream.model is None  # before anything is loaded


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-true"])
def test_what_edits_can_be_made_in_is_not(tmp_path: Path, precision: str) -> None:
    stream = fit(tmp_path, precision, data=make_data(1))
    assert len(stream.ledger) == 1
    assert {value.dtype for value in stream.ledger.deltas.values()} == {torch.float64}


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_states_that_leave_the_range_of_float16_are_refused(tmp_path: Path, command: str) -> None:
    stream = make_stream()
    stream.configure_model()
    assert stream.model is not None
    stream.model.get_input_embeddings().weight.mul_(1e7)
    with pytest.raises(MisconfigurationException, match=r"range of float16 \(65504\).*trainer.precision=bf16-true"):
        getattr(make_trainer(tmp_path, precision="16-true"), command)(stream, make_data(1))


# ---- a device without float64 ----------------------------------------------------------------------------------------


@pytest.fixture
def forget() -> Iterator[None]:
    """Nothing is known of devices, and nobody has been warned."""
    for known in (supports_float64, algebra._warn):
        known.cache_clear()
    yield
    for known in (supports_float64, algebra._warn):
        known.cache_clear()


@pytest.fixture
def remote(forget: None) -> Iterator[None]:
    """A device on which float64 is an error, :data:`tests.remote_device.DEVICE`."""
    with RemoteDevice():
        yield


def test_the_remote_device_is_what_it_plays(remote: None) -> None:
    there = torch.ones(2, 2).to(DEVICE)
    assert (there @ there).cpu().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    for wrong in (
        lambda: there.double(),
        lambda: torch.zeros(1, dtype=torch.float64, device=DEVICE),
        lambda: torch.ones(1, dtype=torch.float64).to(DEVICE),
    ):
        with pytest.raises(TypeError, match="does not support it"):
            wrong()
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(2, 2)


def test_algebra_moves_to_the_cpu_and_says_so_once(remote: None, caplog: pytest.LogCaptureFixture) -> None:
    there = torch.ones(2, dtype=torch.bfloat16).to(DEVICE)
    for _ in range(3):
        exact = for_algebra(there)
    assert (exact.device.type, exact.dtype) == ("cpu", torch.float64)
    assert (algebra_device(torch.device("cpu")).type, algebra_dtype(DEVICE)) == ("cpu", torch.float64)
    assert len(caplog.records) == 1
    assert "mps has no float64: key statistics and solves are kept on the CPU" in caplog.text


def remote_stream(
    model_type: str, statistics: KeyStatistics, journal: Path | None = None, **settings: Any
) -> EditStream:
    stream = make_stream(model_type, contexts="plain", **settings)
    stream.statistics, stream.journal = statistics, None if journal is None else str(journal)
    stream.configure_model()
    assert stream.model is not None
    stream.model.to(DEVICE)
    stream.ledger.align()
    return stream


def edit(stream: EditStream, count: int = 3) -> None:
    session, requests = stream.open(), tiny_requests()[:count]
    for request in requests:
        proposal = session.propose([request], requests)
        assert isinstance(proposal, Proposal)
        session.apply(proposal)


def check_remote_weights(stream: EditStream, original: dict[str, Tensor]) -> None:
    for layer, name in stream.ledger.names.items():
        delta = stream.ledger.deltas[name]
        assert (delta.device.type, delta.dtype) == ("cpu", torch.float64)
        weight = stream.adapter.own_weight(layer).detach()
        assert (weight.device, weight.dtype) == (DEVICE, original[name].dtype)
        exact = original[name].double() + stream.adapter.to_layout(layer, delta)
        torch.testing.assert_close(weight.cpu(), exact.to(weight.dtype), **EXACT)


# torch.norm takes this way where a function mode is on.
@pytest.mark.filterwarnings("ignore:.*frobenius_norm is deprecated.*")
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"keys": "base"}),
        ("llama", {"storage": SolverStorage(inverse="float32")}),
        ("gpt2", {}),
        ("gptj", {}),
        ("gemma2", {}),
    ],
    ids=["llama", "base keys", "float32 inverse", "gpt2", "gptj", "gemma2"],
)
def test_a_model_on_a_device_without_float64_is_edited(
    remote: None, caplog: pytest.LogCaptureFixture, model_type: str, settings: dict[str, Any]
) -> None:
    """Every float64 tensor on the device would raise."""
    stream = remote_stream(model_type, FixedStatistics(), **settings)
    original = unedited(stream, model_type)
    edit(stream)
    stream.ledger.align()
    check_remote_weights(stream, original)
    for solver in stream.editor.solvers.values():
        assert isinstance(solver, RidgeSolver)
        assert {(value.device.type, value.dtype) for value in (solver.gram, solver.inverse, solver.delta)} == {
            ("cpu", torch.float64)
        }
    assert all(norm["mean_abs_delta"] > 0 for norm in stream.ledger.layer_norms().values())

    stream.session.undo([2])
    check_remote_weights(stream, original)
    stream.session.redo([2])
    stream.session.undo([1], exact=True)
    check_remote_weights(stream, original)
    stream.session.undo([entry.number for entry in stream.ledger.entries])
    for name, weight in _weights(stream).items():
        torch.testing.assert_close(weight.cpu(), original[name], **EXACT)
    assert [record.message for record in caplog.records if "no float64" in record.message] == [
        "mps has no float64: key statistics and solves are kept on the CPU (in host memory), passes of the model stay "
        "on mps"
    ]


@pytest.mark.parametrize("what", ["checkpoint", "journal"])
def test_edits_are_taken_up_on_a_device_without_float64(remote: None, tmp_path: Path, what: str) -> None:
    made = remote_stream("llama", FixedStatistics(), tmp_path / "journal")
    edit(made)
    saved = {"ledger": made.ledger.state_dict(), "editor": made.editor.state_dict()}
    again = remote_stream("llama", FixedStatistics(), tmp_path / "journal")
    if what == "checkpoint":
        again.ledger.load_state_dict(saved["ledger"])
        again._prepare_editor()
        again.editor.load_state_dict(saved["editor"])
    else:
        again.open()
    check_remote_weights(again, unedited(again))
    left, right = _weights(made), _weights(again)
    assert [name for name in left if not torch.equal(left[name].cpu(), right[name].cpu())] == []


def test_a_solver_of_a_matrix_on_a_device_without_float64(remote: None) -> None:
    solver = RidgeSolver(torch.eye(12).to(DEVICE), 5)
    solver.update(*(fact.to(DEVICE) for fact in make_facts(2)))
    assert (solver.delta.device.type, solver.delta.dtype) == ("cpu", torch.float64)


def test_statistics_are_counted_on_a_device_without_float64(remote: None, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"{r.text} {r.target_new}." for r in tiny_requests() * 8))
    statistics = KeyStatistics(corpus=str(tmp_path / "texts.txt"), cache=str(tmp_path / "cache"))
    stream = remote_stream("llama", statistics, ridge=0.1)
    edit(stream, 1)
    moment = statistics.compute(ModelAdapter(tiny_model()), tiny_tokenizer(), [1])[1]  # found in the cache
    assert (moment.device.type, moment.dtype) == ("cpu", torch.float64)
    check_remote_weights(stream, unedited(stream))


def test_measurements_leave_no_sums_behind_in_the_model(tmp_path: Path) -> None:
    """Lightning moves all submodules to the device, and these are float64."""
    stream = fit(tmp_path, "32-true", data=make_data(1))
    make_trainer(tmp_path / "validated").validate(stream, make_data(1))
    kept = [name for name, module in stream.named_modules() if type(module).__module__.startswith("lit_edit.metrics")]
    assert kept == []


# ---- a CPU without float64 -------------------------------------------------------------------------------------------


class _NoFloat64(TorchDispatchMode):
    """Refuses to compute a tensor of float64, wherever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_flatten(made)[0]):
            raise RuntimeError(f"{func._schema.name}: float64 is not implemented")
        return made


def test_a_cpu_without_float64_is_edited_in_float32(
    forget: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"{r.text} {r.target_new}." for r in tiny_requests() * 8))
    statistics = KeyStatistics(corpus=str(tmp_path / "texts.txt"), cache=str(tmp_path / "cache"))
    exact = make_stream(contexts="plain", ridge=0.1)
    exact.statistics = statistics
    edit(exact, 2)
    exact.session.undo([1])
    supports_float64.cache_clear()
    with _NoFloat64():
        stream = make_stream(contexts="plain", ridge=0.1)
        stream.statistics = KeyStatistics(corpus=str(tmp_path / "texts.txt"), cache=str(tmp_path / "other"))
        edit(stream, 2)
        stream.session.undo([1])
        norms = stream.ledger.layer_norms()
    assert [r.levelname for r in caplog.records if "no float64 on the CPU" in r.message] == ["WARNING"]
    original = unedited(stream)
    for layer, name in stream.ledger.names.items():
        delta = stream.ledger.deltas[name]
        assert (delta.dtype, norms[name]["mean_abs_delta"] > 0) == (torch.float32, True)
        assert torch.equal(stream.adapter.own_weight(layer), original[name] + delta)
    for name, delta in exact.ledger.deltas.items():  # six digits, less what the condition of the statistics takes
        torch.testing.assert_close(stream.ledger.deltas[name].double(), delta, rtol=1e-2, atol=1e-3)
