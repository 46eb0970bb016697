"""MEND: the network by hand and against autograd, its training, the editor's record, what is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_edit import EditRequest, EditStream, LanguageModel
from lit_edit.data.request import DataError
from lit_edit.editors.gradient.mend import MEND
from lit_edit.editors.gradient.mend_network import MENDNetwork, NetworkOrigin, Normaliser
from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation
from lit_edit.training.data import RecordsDataModule
from lit_edit.training.mend import MENDTraining
from tests.streams import FixedStatistics

REQUESTS = tiny_requests()
F32, F64 = torch.float32, torch.float64
LAYERS = [1, 2]


def save_network(
    path: Path, family: str = "gpt2", dtype: torch.dtype = F64, noise: float = 0.0, rate: float = 2**-7
) -> str:
    """A network for a tiny model: new, or with random numbers in the place of zeros, and a normaliser that has seen."""
    origin = NetworkOrigin.of(ModelAdapter(tiny_model(family, dtype)), LAYERS, "tiny")
    network = MENDNetwork(origin, rank=5, rate=rate).to(dtype)
    if noise:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name != "rates":
                    value.add_(noise * torch.randn(value.shape, generator=draw, dtype=dtype))
        for layer in LAYERS:
            rows, columns = origin.shapes[layer]
            network.observe(
                layer,
                torch.randn(9, columns, generator=draw, dtype=dtype),
                torch.randn(9, rows, generator=draw, dtype=dtype),
            )
    network.save(path, {"made": "for a test"})
    return str(path)


@pytest.fixture
def network(tmp_path: Path) -> str:
    return save_network(tmp_path / "network.safetensors", noise=0.05)


def start(editor: MEND, family: str = "gpt2", journal: Path | None = None, **settings: Any) -> EditSession:
    language_model = LanguageModel.of(tiny_model(family, F64, **settings), tiny_tokenizer())
    file = None if journal is None else str(journal)
    return EditStream(language_model, editor, FixedStatistics(), journal=file).open()


def make(session: EditSession, requests: Sequence[EditRequest], batch: int = 1) -> EditSession:
    for first in range(0, len(requests), batch):
        proposal = session.propose(requests[first : first + batch], requests[first : first + batch])
        assert proposal is not None
        session.apply(proposal)
    return session


def weights(session: EditSession) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.ledger.adapter.model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "most"), [("gpt2", 1e-9), ("llama", 1e-6)])  # norms of the latter are float32
def test_a_new_network_makes_the_plain_gradient_step(family: str, most: float, tmp_path: Path) -> None:
    session = start(MEND(save_network(tmp_path / "n.safetensors", family)), family)
    proposal = session.propose(REQUESTS[:2], REQUESTS[:2])
    assert proposal is not None
    adapter = ModelAdapter(tiny_model(family, F64))
    for parameter in (adapter.own_weight(layer) for layer in LAYERS):
        parameter.requires_grad_(True)
    loss = torch.zeros((), dtype=F64)
    for request in REQUESTS[:2]:  # each edit's own mean, summed
        prompt, target = continuation(tiny_tokenizer(), request.text, request.target_new)
        assert len(target) > 1  # more than one place to get wrong
        logits = adapter.model(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0, len(prompt) - 1 :]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(target))
    loss.backward()
    for update in proposal.updates:
        gradient = adapter.own_weight(update.layer).grad
        assert gradient is not None
        assert gradient.norm() > 1e-3
        step = -(2**-7) * adapter.to_layout(update.layer, gradient)
        torch.testing.assert_close(update.delta, step.to(F64), rtol=0, atol=most * float(step.abs().max()))


def test_the_normaliser_by_hand() -> None:
    normaliser = Normaliser(2)
    rows = torch.tensor([[8.0, 5.0]])
    assert torch.equal(normaliser(rows), rows)  # has seen nothing
    normaliser.observe(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    normaliser.observe(torch.tensor([[8.0, 2.0]]))
    assert int(normaliser.count) == 3
    assert normaliser.mean.tolist() == [4.0, 2.0]  # variance 13, and one that has never varied
    torch.testing.assert_close(normaliser(rows), torch.tensor([[4 / 13**0.5, 0.0]]))
    assert set(normaliser.state_dict()) == {"count", "mean", "squares"}


def by_hand() -> MENDNetwork:
    """For rows [u1, u2, d]; layer 5 is the second of its shape."""
    origin = NetworkOrigin("none", "none", 9, {3: (1, 2), 5: (1, 2)}, {3: "", 5: ""})
    network = MENDNetwork(origin, rank=1, rate=0.5).to(F64)
    one, two = network.mlps["1x2"]
    with torch.no_grad():
        one.down.copy_(torch.tensor([[1.0, 0.0, 1.0]]))  # reads u1 + d
        one.up.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
        one.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        one.scale[1] = 2.0
        one.offset[1] = torch.tensor([1.0, 0.0, 0.0])
        two.down.copy_(torch.tensor([[0.0, 1.0, 0.0]]))  # reads u2
        two.up.copy_(torch.tensor([[0.0], [0.0], [-3.0]]))
        network.rates[1] = 0.25
    return network


def test_the_network_by_hand() -> None:
    network = by_hand()
    # Read 1 + 2 = 3: moved by [3, -3, 7], the negative one is cut off, h = [4, 2, 9]; then d falls by 3 * 2.
    u, v = network(3, torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0]]))
    assert u.tolist() == [[4.0, 2.0]]
    assert v.tolist() == [[-0.5 * 3.0]]
    # The other layer: scaled by 2 and shifted, [7, -6, 14]: h = [8, 2, 16], d = 10.
    u, v = network(5, torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0]]))
    assert u.tolist() == [[8.0, 2.0]]
    assert v.tolist() == [[-0.25 * 10.0]]
    update = network.update(5, torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[2.0], [2.0]]))
    assert update.tolist() == [[2 * 8.0 * -2.5, 2 * 2.0 * -2.5]]


def test_tokens_that_say_nothing_write_nothing_and_are_not_counted() -> None:
    network = by_hand()
    inputs = torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.0, 0.0]])
    gradients = torch.tensor([[2.0], [0.0], [4.0]])
    network.observe(5, inputs, gradients)
    assert network.normalisers["5"].mean.tolist() == [1.0, 2.0, 2.0]
    assert int(network.normalisers["3"].count) == 0
    u, v = network(3, inputs, gradients)
    assert u[1:].tolist() == [[0.0, 0.0]] * 2
    assert v[1:].tolist() == [[0.0]] * 2
    network.observe(5, inputs[1:2], gradients[2:])
    u, v = network(5, inputs, gradients)  # what is zero is not, once centred
    assert v[1:].tolist() == [[0.0]] * 2
    assert v[0].tolist() != [0.0]


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(FactsError, match="gradients hold NaN"):
        by_hand()(3, torch.ones(1, 2), torch.full((1, 1), torch.nan))


def test_both_layers_of_the_network_learn_from_the_first_step_on() -> None:
    origin = NetworkOrigin("none", "none", 9, {3: (2, 3)}, {3: ""})
    network = MENDNetwork(origin, rank=2).to(F64)
    network.update(3, torch.randn(4, 3), torch.randn(4, 2)).square().sum().backward()
    for block in network.mlps["2x3"]:
        assert block.up.grad.abs().max() > 0


def test_a_network_survives_its_file(network: str) -> None:
    loaded = MENDNetwork.load(Path(network))
    loaded.save(Path(network + "2"))
    again = MENDNetwork.load(Path(network + "2"))
    assert equal(dict(loaded.state_dict()), dict(again.state_dict()))
    assert loaded.origin == again.origin
    assert (loaded.rank, loaded.hidden, loaded.layers) == (5, 1, (1, 2))
    assert loaded.digest == again.digest
    assert int(again.normalisers["1"].count) == 9
    assert not any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        again.rates[0] *= 1 + 1e-15
    assert loaded.digest != again.digest
    with safe_open(network, framework="pt") as file:
        assert '"made": "for a test"' in file.metadata()["network"]


# ---- the editor ------------------------------------------------------------------------------------------------------


def test_looking_changes_nothing(network: str) -> None:
    session = make(start(MEND(network)), REQUESTS[:1])
    before = weights(session)
    one, other = (session.propose(REQUESTS[1:3], REQUESTS[1:3]) for _ in range(2))
    assert one is not None
    assert other is not None
    assert equal(weights(session), before)
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(one.updates, other.updates, strict=True))
    assert all(p.grad is None for p in session.ledger.adapter.model.parameters())


def test_a_journal_is_done_again_bit_for_bit(network: str, tmp_path: Path) -> None:
    session = make(start(MEND(network), journal=tmp_path / "j"), REQUESTS[:4])
    session.undo([2])
    session.undo([4])
    session.redo([2])
    make(session, REQUESTS[4:], batch=2)
    again = start(MEND(network), journal=tmp_path / "j")
    again.repeat_all()
    assert equal(weights(again), weights(session))
    assert equal(again.editor.state_dict()["sums"], session.editor.state_dict()["sums"])


def test_a_journal_is_not_continued_with_another_network(network: str, tmp_path: Path) -> None:
    one = start(MEND(network))
    other = start(MEND(save_network(tmp_path / "other.safetensors", noise=0.06)))
    assert one.editor.settings() != other.editor.settings()


def test_undo_subtracts_and_redo_adds(network: str) -> None:
    session = make(start(MEND(network)), REQUESTS[:2])
    second = weights(session)
    make(session, REQUESTS[2:4])
    fourth = weights(session)
    session.undo([3, 4])
    assert gap(weights(session), second) < 1e-12
    session.redo([3, 4])
    assert gap(weights(session), fourth) < 1e-12
    session.undo([1, 2, 3, 4])
    assert equal(weights(session), dict(tiny_model("gpt2", F64).named_parameters()))


def test_edits_of_one_step_can_be_told_apart(network: str) -> None:
    session = make(start(MEND(network)), REQUESTS[:3], batch=3)
    together = weights(session)
    session.undo([2])
    two = make(start(MEND(network)), [REQUESTS[0], REQUESTS[2]], batch=2)
    assert gap(weights(session), weights(two)) < 1e-12
    assert gap(weights(session), together) > 1e-6
    session.redo([2])
    assert gap(weights(session), together) < 1e-12


def test_an_edit_replaces_an_earlier_one_of_the_same_fact(network: str) -> None:
    session = make(start(MEND(network)), REQUESTS[:1])
    again = replace(REQUESTS[0], id="again", target_new="Paris")
    make(session, [again])
    assert [entry.number for entry in session.ledger.entries] == [2]
    assert gap(weights(session), weights(make(start(MEND(network)), [again]))) < 1e-12


def test_a_resumed_stream_equals_an_uninterrupted_one(network: str) -> None:
    whole = make(start(MEND(network)), REQUESTS[:4])
    first = make(start(MEND(network)), REQUESTS[:2])
    file = io.BytesIO()
    torch.save({"editor": first.editor.state_dict(), "ledger": first.ledger.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = start(MEND(network))
    second.editor.load_state_dict(state["editor"])
    second.ledger.load_state_dict(state["ledger"])
    assert equal(weights(make(second, REQUESTS[2:4])), weights(whole))


def test_the_ledger_tells_of_each_edit(network: str) -> None:
    session = make(start(MEND(network)), REQUESTS[:2], batch=2)
    alone = make(start(MEND(network)), REQUESTS[1:2])
    told = session.ledger.entries[1].facts
    assert told["increment_norm"] == pytest.approx(alone.ledger.entries[0].facts["increment_norm"], rel=1e-9)
    deltas = alone.ledger.deltas
    assert told["increment_norm"] ** 2 == pytest.approx(sum(float(d.square().sum()) for d in deltas.values()), rel=1e-9)
    assert len(deltas) == 2


def test_the_ledger_tells_what_an_edit_has_done_to_its_target(network: str) -> None:
    session = start(MEND(network))
    prompt, target = continuation(tiny_tokenizer(), REQUESTS[0].text, REQUESTS[0].target_new)

    def probability() -> float:
        logits = session.ledger.adapter.model(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0]
        logp = logits[len(prompt) - 1 :].log_softmax(-1)
        return float(logp[range(len(target)), list(target)].mean().exp())

    before = probability()
    make(session, REQUESTS[:1])
    told = session.ledger.entries[0].facts
    assert told["target_probability_before"] == pytest.approx(before, rel=1e-9)
    assert told["target_probability"] == pytest.approx(probability(), rel=1e-9)
    assert told["target_probability"] != pytest.approx(before, rel=1e-3)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_without_a_network_it_says_how_to_train_one() -> None:
    with pytest.raises(ArgumentError, match=r"init_args.network.*lit-edit fit --config train/mend"):
        MEND()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {"seed": 1}, r"trained for tiny, and this model has other weights in layer 1, 2.*same_weights"),
        ("gpt2", {"n_embd": 16}, r"for tiny \(gpt2, 4 layers, down projections 32 x 128\).*down projections 16 x 64"),
        ("gpt2", {"n_layer": 2}, r"4 layers.*this model is gpt2, 2 layers"),
        ("llama", {}, r"this model is llama, 4 layers, down projections 32 x 48"),
    ],
)
def test_a_network_of_another_model_is_refused(
    family: str, settings: dict[str, Any], message: str, network: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        start(MEND(network), family, **settings)


def test_other_weights_can_be_allowed_and_another_type_is_none(network: str) -> None:
    assert make(start(MEND(network, same_weights=False), seed=1), REQUESTS[:1]).ledger.deltas
    short = ModelAdapter(tiny_model("gpt2", F32))  # the tiny model is made in float32
    MENDNetwork.load(Path(network)).origin.check_weights({n: short.weight(n) for n in LAYERS})


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    adapter = ModelAdapter(tiny_model("gpt2"))
    file = tmp_path / "x.safetensors"
    with pytest.raises(ArgumentError, match=r"no such file; train a network with lit-edit fit"):
        MEND(str(file)).resolve_layers(adapter)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ArgumentError, match="no MEND network, or a damaged one"):
        MEND(str(file)).resolve_layers(adapter)
    save_file({"rates": torch.ones(2)}, file)
    with pytest.raises(ArgumentError, match="holds no MEND network"):
        MEND(str(file)).resolve_layers(adapter)
    save_network(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArgumentError, match="damaged"):
        MEND(str(file)).resolve_layers(adapter)


# ---- training --------------------------------------------------------------------------------------------------------


def train(folder: Path, steps: int = 8, **options: Any) -> tuple[MENDTraining, Trainer]:
    torch.manual_seed(0)
    module = MENDTraining(
        LanguageModel.of(tiny_model("gpt2", F32), tiny_tokenizer()),
        **{"layers": LAYERS, "rank": 4, "edit_rate": 0.02, "lr": 1e-2, "rate_lr": 1e-2, "warm_up": 2, **options},
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
    )
    trainer.fit(module, RecordsDataModule.from_requests(REQUESTS, validation=2, batch_size=2))
    module.save_network(folder / "network.safetensors")
    return module, trainer


def test_training_lowers_the_loss_and_leaves_a_network_to_edit_with(tmp_path: Path) -> None:
    module, trainer = train(tmp_path, edit_weight=1.0)
    assert equal(
        dict(module.adapter.model.named_parameters()), dict(tiny_model("gpt2", F32).named_parameters())
    )  # the language model is as it was
    records = [module.prepared[request.id] for request in REQUESTS[:4]]
    new = MENDNetwork(module.network.origin, 4, 1, 0.02)
    for name, normaliser in module.network.normalisers.items():
        assert int(normaliser.count) == sum(
            int((r.gradients[int(name)] != 0).any(1).sum()) for r in records
        )  # the training records, each once
        new.normalisers[name].load_state_dict(normaliser.state_dict())
    with torch.no_grad():
        after = sum(float(module._losses_of(record)[0]) for record in records)
        trained, module.network = module.network, new
        before = sum(float(module._losses_of(record)[0]) for record in records)
    assert after < 0.9 * before
    measured = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert {"val/edit_success", "val/generalization", "val/drawdown", "val/locality", "val/loss"} <= measured
    network = MENDNetwork.load(tmp_path / "network.safetensors")
    assert equal(dict(network.state_dict()), dict(trained.state_dict()))
    assert network.layers == (1, 2)
    session = make(start(MEND(str(tmp_path / "network.safetensors"))), REQUESTS[:1])
    assert session.ledger.deltas


def test_one_step_lowers_the_loss_of_its_record(tmp_path: Path) -> None:
    module = MENDTraining(LanguageModel.of(tiny_model("gpt2", F64), tiny_tokenizer()), LAYERS, rank=4, lr=1e-3)
    module.configure_model()
    record = module._known(REQUESTS[0])
    optimizer = module.configure_optimizers()
    before = module._losses_of(record)[0]
    before.backward()
    optimizer.step()
    assert module._losses_of(record)[0].item() < before.item()


def test_the_losses_are_those_of_plain_passes() -> None:
    module = MENDTraining(
        LanguageModel.of(tiny_model("gpt2", F64), tiny_tokenizer()),
        LAYERS,
        rank=4,
        edit_rate=0.05,
        edit_weight=0.3,
        locality_weight=2.0,
    )
    module.configure_model()
    request = REQUESTS[1]
    record = module._known(request)
    loss, edit, locality = module._losses_of(record)
    edited, plain = tiny_model("gpt2", F64), tiny_model("gpt2", F64)
    adapter = ModelAdapter(edited)
    for layer in LAYERS:
        update = module.network.update(layer, record.inputs[layer], record.gradients[layer]).detach()
        adapter.own_weight(layer).data += adapter.to_layout(layer, update)

    def said(model: Any, text: str, target: str) -> tuple[Tensor, Tensor]:
        prompt, words = continuation(tiny_tokenizer(), text, target)
        logits = model(input_ids=torch.tensor([[*prompt, *words[:-1]]])).logits[0, len(prompt) - 1 :]
        return logits.log_softmax(-1), torch.tensor(words)

    nll = []
    for text in (request.text, *request.paraphrases):
        logp, words = said(edited, text, request.target_new)
        nll += [-float(row[word]) for row, word in zip(logp, words, strict=True)]
    moved = []
    for probe in request.neighborhood:
        p, q = (said(model, probe.prompt, probe.answer)[0] for model in (plain, edited))
        moved += (p.exp() * (p - q)).sum(1).tolist()
    assert float(edit.detach()) == pytest.approx(sum(nll) / len(nll), rel=1e-9)
    assert float(locality.detach()) == pytest.approx(sum(moved) / len(moved), rel=1e-6)
    assert float(locality.detach()) > 1e-6
    assert float(loss.detach()) == pytest.approx(0.3 * float(edit.detach()) + 2 * float(locality.detach()), rel=1e-12)


def test_a_training_that_goes_on_counts_no_record_twice(tmp_path: Path) -> None:
    module, _ = train(tmp_path, steps=2)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    counts = {name: int(normaliser.count) for name, normaliser in module.network.normalisers.items()}
    module.on_load_checkpoint(checkpoint)
    module.prepared.clear()  # as in a new process
    for request in REQUESTS[:4]:
        module._known(request)
    assert {name: int(normaliser.count) for name, normaliser in module.network.normalisers.items()} == counts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"layers": [2, 1]}, "layers must be ascending"),
        ({"edit_weight": -1.0}, "edit_weight must not be negative"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MENDTraining(LanguageModel(), **settings)


def test_records_for_training_and_those_held_out() -> None:
    data = RecordsDataModule.from_requests(REQUESTS, skip=1, limit=4, validation=1, batch_size=2)
    assert [r.id for r in data.training] == ["1", "2", "3"]
    assert [r.id for batch in data.val_dataloader() for r in batch.requests] == ["4"]
    orders = [[r.id for batch in data.train_dataloader() for r in batch.requests] for _ in range(2)]
    assert orders[0] == orders[1]  # by the seed
    assert sorted(orders[0]) == ["1", "2", "3"]
    with pytest.raises(DataError, match=r"6 records behind skip=0, of which 6 are held out"):
        RecordsDataModule.from_requests(REQUESTS, validation=6)
    with pytest.raises(ValueError, match="limit must be larger than validation"):
        RecordsDataModule(limit=5, validation=5)
