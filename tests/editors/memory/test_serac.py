"""SERAC: its networks are trained by ``lit-edit fit`` and kept; who answers a prompt is what the classifier says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_edit import EditRequest, EditStream, LanguageModel
from lit_edit.cli.main import main
from lit_edit.data.request import DataError
from lit_edit.editors import SERAC
from lit_edit.editors.memory.serac_network import ScopeClassifier, SeracNetwork, record_number, stated
from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations, text_nlls
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.memory import Route
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.training.scope_data import ScopeData, ScopePair, pairs_of
from lit_edit.training.serac import SeracTraining
from tests.editors.memory.words import NarrowEncoder
from tests.streams import FixedStatistics

REQUESTS = tiny_requests()
TOKENIZER = tiny_tokenizer()
WORDS = NarrowEncoder()


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lit_edit.editors.memory.serac", "lit_edit.training.serac"):
        monkeypatch.setattr(f"{module}.load_encoder", lambda name: NarrowEncoder())


def training_of(**settings: Any) -> SeracTraining:
    chosen: dict[str, Any] = {"layers": [1, 3], "rank": 2, "hidden": 8, "lr": 1e-2, **settings}
    training = SeracTraining(LanguageModel.of(tiny_model(), TOKENIZER), **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        training.configure_model()
    return training


def network_of(training: SeracTraining) -> SeracNetwork:
    assert training.network is not None
    return training.network


# ---- the networks -------------------------------------------------------------------------------------------------


def test_the_classifier_is_its_formula_and_the_table_holds_all_pairs() -> None:
    torch.manual_seed(0)
    classifier = ScopeClassifier(3, 2)
    prompts, edits = torch.randn(5, 3), torch.randn(4, 3)
    table = classifier.table(prompts, edits, pairs=8)  # two rows at a time
    for i, u in enumerate(prompts):
        for j, v in enumerate(edits):
            features = torch.cat([u, v, (u - v).abs(), u * v]) * 3**0.5
            hidden = (classifier.inner.weight @ features + classifier.inner.bias).clamp(min=0)
            logit = (classifier.outer.weight @ hidden + classifier.outer.bias)[0]
            assert table[i, j].item() == pytest.approx((1 / (1 + torch.exp(-logit))).item(), abs=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # Linear, and Conv1D, which lies the other way
def test_the_counterfactual_model_has_an_update_of_low_rank(model_type: str) -> None:
    adapter = ModelAdapter(tiny_model(model_type))
    network = SeracNetwork(4, 2, {2: adapter.shape(2)}, rank=2)
    torch.nn.init.normal_(network.up["2"])
    (name, weight), *none = network.weights(adapter).items()
    assert (name, none) == (adapter.weight_name(2), [])
    update = adapter.to_layout(2, weight - adapter.weight(2))
    torch.testing.assert_close(update, network.up["2"] @ network.down["2"], atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2


def test_steps_of_the_optimizer_lower_the_loss_and_leave_the_model_alone() -> None:
    training = training_of()
    adapter = training._models[0]
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    pairs = pairs_of(REQUESTS, 1, 0)
    optimizer = training.configure_optimizers()
    scope, counterfactual, logits = training.losses(pairs)
    first = scope + counterfactual
    # By hand: the mean over pairs, and the plain model's nll behind the edits, as its update is still nothing.
    labels = torch.tensor([float(pair.inside) for pair in pairs])
    p = torch.sigmoid(logits)
    assert scope.item() == pytest.approx(-(labels * p.log() + (1 - labels) * (1 - p).log()).mean().item(), abs=1e-5)
    inside = [pair for pair in pairs if pair.inside][:8]
    asked = [(stated(pair.edit, pair.target) + pair.asked, pair.target) for pair in inside]
    plain = [score.nll for score in score_continuations(adapter, TOKENIZER, asked)]
    assert counterfactual.item() == pytest.approx(sum(plain) / len(plain), abs=1e-4)

    first.backward()
    optimizer.step()
    scope, counterfactual, _ = training.losses(pairs)
    assert (scope + counterfactual).item() < first.item()
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    trained = {name.partition(".")[2] for name, _ in training.named_parameters()}
    assert trained == set(dict(network_of(training).named_parameters()))
    assert set(training.state_dict()) == {f"network.{name}" for name in trained}  # no model in a checkpoint


def test_a_kept_network_is_the_same_one(tmp_path: Path) -> None:
    training = training_of()
    network = network_of(training)
    torch.nn.init.normal_(network.up["3"])
    training.seen = {record_number("b"), record_number("a")}
    path = tmp_path / "network.safetensors"
    training.save_network(path)
    for where in (path, tmp_path):  # the file, or the folder that has it
        again, known, seen = SeracNetwork.load(where)
        assert seen == training.seen
        assert again.layers == (1, 3)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert {"encoder": "all-minilm-l6-v2", "rank": 2, "editor": "SERAC"}.items() <= known.items()


def test_what_is_no_network_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"SERAC needs a trained network: train one with 'lit-edit fit --config"):
        SERAC()
    with pytest.raises(ArgumentError, match=r"there is no network\.safetensors here; train one with"):
        SeracNetwork.load(tmp_path)
    path = tmp_path / "network.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match="is no network of SERAC"):
        SeracNetwork.load(path)
    save_file({"a": torch.zeros(1)}, path, {"other": "1"})
    with pytest.raises(ArgumentError, match="is no network of SERAC"):
        SeracNetwork.load(path)
    training_of().save_network(path)
    metadata = {"serac": '{"width": 48, "hidden": 9, "rank": 2}'}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ArgumentError, match="size mismatch"):
        SeracNetwork.load(path)
    with pytest.raises(ValueError, match="threshold is a probability"):
        SERAC(str(path), threshold=2.0)
    for settings, said in (({"rank": 0}, "rank must be"), ({"lr": 0.0}, "lr must be"), ({"layers": [4]}, "layer 4")):
        with pytest.raises(ValueError, match=said):
            training_of(**settings)


# ---- its data -----------------------------------------------------------------------------------------------------


def test_pairs_are_inside_for_the_edits_own_prompts_only() -> None:
    pairs = pairs_of(REQUESTS, 2, 0)
    assert len(pairs) == 6 * (2 + 1 + 2)
    for request in REQUESTS:
        own = [pair for pair in pairs if pair.edit == request.text]
        assert {pair.asked for pair in own if pair.inside} == {request.text, *request.paraphrases}
        outside = {pair.asked for pair in own if not pair.inside}
        assert {probe.prompt for probe in request.neighborhood} < outside
        assert not outside & {request.text, *request.paraphrases}
        assert {pair.target for pair in own} == {request.target_new}
    assert pairs == pairs_of(REQUESTS, 2, 0)


def test_held_out_edits_are_in_no_training_pair() -> None:
    data = ScopeData("builtin", offset=8, limit=40, held_out=0.25)
    data.setup("fit")
    assert len(data.held) == 10
    assert len(data.requests) <= 30
    assert not {request.subject for request in data.requests} & {request.subject for request in data.held}
    batches = list(data.train_dataloader())
    assert all(isinstance(pair, ScopePair) for batch in batches for pair in batch)
    assert {pair.edit for batch in batches for pair in batch} == {request.text for request in data.requests}
    first = ScopeData("builtin", offset=0, limit=8)
    first.setup("fit")
    assert not {r.id for r in first.requests + first.held} & {r.id for r in data.requests + data.held}
    for settings, said in (({"held_out": 1.0}, "data.held_out"), ({"limit": 1}, "data.limit must be at least 2")):
        with pytest.raises(ValueError, match=said):
            ScopeData("builtin", **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        ScopeData("builtin", offset=1000).setup("fit")


# ---- the editor ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``lit-edit fit --config train/serac`` on the tiny model."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--data.source=builtin", "--data.offset=0", "--data.limit=20", "--data.batch_size=40", "--data.others=1"]
    words += [f"--model.language_model.name={tiny_folder}", "--model.layers=[2,3]", "--model.rank=2", "--model.lr=0.01"]
    words += ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_edit.training.serac.load_encoder", lambda name: NarrowEncoder())
        assert main(["fit", "--config", "train/serac", *words, "--runs_dir", str(runs), "--run_name", "serac"]) == 0
    return runs / "serac"


def session_of(network: Path, journal: Path | None = None, **settings: Any) -> EditSession:
    language_model = LanguageModel.of(settings.pop("model", None) or tiny_model("llama"), TOKENIZER)
    editor = SERAC(str(network), **settings)
    file = None if journal is None else str(journal)
    return EditStream(language_model, editor, FixedStatistics(), journal=file).open()


def make(session: EditSession, requests: Sequence[EditRequest]) -> EditSession:
    for request in requests:
        proposal = session.propose([request], [request])
        assert proposal is not None
        session.apply(proposal)
    return session


def test_the_run_keeps_what_the_editor_takes(run: Path) -> None:
    assert {"config.yaml", "metrics.csv", "checkpoints", "network.safetensors"} <= {p.name for p in run.iterdir()}
    header = (run / "metrics.csv").read_text().partition("\n")[0]
    assert {"train/scope_accuracy", "val/scope_accuracy", "val/counterfactual_nll"} <= set(header.split(","))
    network, _, seen = SeracNetwork.load(run)
    assert network.layers == (2, 3)
    data = ScopeData("builtin", offset=0, limit=20)
    data.setup("fit")
    assert seen == {record_number(request.text) for request in data.requests}


def threshold_between(run: Path, requests: Sequence[EditRequest]) -> float:
    """A threshold that half of the prompts pass: the tiny classifier has no opinion of its own."""
    network = SeracNetwork.load(run)[0]
    prompts = WORDS([request.text for request in REQUESTS])
    best = network.classifier.table(prompts, WORDS([request.text for request in requests])).amax(1).sort().values
    middle = len(best) // 2
    return float(best[middle - 1] + best[middle]) / 2


def test_the_counterfactual_model_answers_within_the_scope_and_the_model_itself_without(run: Path) -> None:
    edits, prompts = REQUESTS[:3], [request.text for request in REQUESTS]
    threshold = threshold_between(run, edits)
    session = make(session_of(run, threshold=threshold), edits)
    adapter, original = session.ledger.adapter, session.ledger.original()
    network = SeracNetwork.load(run)[0]
    table = network.classifier.table(WORDS(prompts), WORDS([edit.text for edit in edits]))
    counterfactual = original.with_weights(network.weights(original))
    routes = adapter.routes(prompts)
    assert {route == Route() for route in routes} == {True, False}
    for prompt, row, route in zip(prompts, table, routes, strict=True):
        (found,) = score_continuations(adapter, TOKENIZER, [(prompt, "Vienna")])
        best = edits[int(row.argmax())]
        if row.max() > threshold:
            assert route.context == f"{best.text} {best.target_new}\n"
            (expected,) = score_continuations(counterfactual, TOKENIZER, [(route.context + prompt, "Vienna")])
        else:
            assert route == Route()
            (expected,) = score_continuations(original, TOKENIZER, [(prompt, "Vienna")])
            assert torch.equal(*(text_nlls(a, TOKENIZER, [prompt])[0] for a in (adapter, original)))
        assert (found.nll, found.choice.tolist()) == (expected.nll, expected.choice.tolist())


def test_edits_are_taken_out_put_back_and_taken_up_again(run: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    session = make(session_of(run, journal, threshold=0.0), REQUESTS[:3])  # every prompt is in some scope

    def asked(session: EditSession) -> list[str]:
        return [route.context for route in session.ledger.adapter.routes([r.text for r in REQUESTS])]

    whole = asked(session)
    session.undo([1, 2])
    assert asked(session) == [stated(REQUESTS[2].text, REQUESTS[2].target_new)] * 6
    saved = session.editor.state_dict()
    session.redo([2])
    session.redo([1])
    assert asked(session) == whole
    again = session_of(run, journal, threshold=0.0)
    assert asked(again) == whole
    again.undo([1, 2])
    again.editor.load_state_dict(saved)
    assert asked(again) == asked(make(again, []))
    with pytest.raises(ValueError, match="threshold"):
        session_of(run, journal, threshold=0.9)


def test_an_edit_that_was_trained_on_is_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ScopeData("builtin", offset=0, limit=20)
    data.setup("fit")
    with caplog.at_level(logging.WARNING):
        make(session_of(run), [data.held[0], REQUESTS[1]])
        assert "trained on" not in caplog.text
        make(session_of(run), [data.requests[0]])
    assert f"edit {data.requests[0].id}" in caplog.text
    assert "flatters" in caplog.text


def test_another_small_model_answers_for_a_larger_one(run: Path, tiny_folder: Path) -> None:
    """The network was trained on a model of other weights than the one that is edited: that one is loaded."""
    large = tiny_model("llama", seed=1)
    session = make(session_of(run, model=large, threshold=0.0), REQUESTS[:1])
    (route,) = session.ledger.adapter.routes(["x"])
    assert route.adapter is not None
    assert route.adapter.model is not large
    small = ModelAdapter(tiny_model("llama"))
    expected = small.with_weights(SeracNetwork.load(run)[0].weights(small))
    pair = [("Well, Italy", "Vienna")]
    assert score_continuations(route.adapter, TOKENIZER, pair)[0].nll == pytest.approx(
        score_continuations(expected, TOKENIZER, pair)[0].nll, abs=1e-5
    )


def test_a_network_for_other_sizes_is_refused(run: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    tiny_model("llama", intermediate_size=40).save_pretrained(wide)
    TOKENIZER.save_pretrained(wide)
    with pytest.raises(ArgumentError, match="whose layers have other sizes"):
        session_of(run, counterfactual=str(wide))
