"""Editing in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lit_edit
from lit_edit import D4S, MEMIT, EditRequest, Outcome, TargetSettings
from lit_edit.data.request import DataError
from lit_edit.errors import ArgumentError
from lit_edit.metrics.evaluation import evaluate_edits, summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.second_moment import KeyStatistics
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.tolerances import SINGLE, assert_near, rounding

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning"),
]
STRONG = TargetSettings(steps=30, kl_factor=0.0, weight_decay=0.0, clamp=50.0)
MAPPINGS: list[dict[str, Any]] = [
    {"prompt": "The capital of Italy is", "subject": "Italy", "target_new": "Vienna"},
    {"prompt": "Hamlet was written by", "subject": "Hamlet", "target_new": "Jules Verne"},
]


@pytest.fixture(autouse=True)
def _little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of a few sampled rows: the default works, in milliseconds."""
    from lit_edit.stats.corpus import SampledText

    monkeypatch.setattr(SampledText.__init__, "__defaults__", (0, 16, 16, 50, ("The", "A")))
    monkeypatch.setattr("lit_edit.session.opening.DEFAULT_STATISTICS", KeyStatistics())


def editor(kind: type = D4S, **settings: Any) -> Any:
    defaults = {"layers": [1, 2], "covariance_weight": 1e-3, "contexts": "plain", "target": STRONG}
    return kind(**{**defaults, **settings})


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(model: PreTrainedModel, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.named_parameters() if torch.equal(value, before[name])]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    model = tiny_model(request.param)
    before = weights(model)
    statistics = KeyStatistics(cache=str(tmp_path_factory.mktemp("cache")))
    returned, outcome = lit_edit.edit(model, tiny_tokenizer(), tiny_requests(), editor(), statistics)
    return model, before, returned, outcome


def test_the_same_object_is_returned_with_only_the_edited_layers_changed(edited: tuple[Any, ...]) -> None:
    model, before, returned, outcome = edited
    assert returned is model
    changed = set(before) - set(same(model, before))
    assert changed == set(outcome.ledger.names.values())
    assert len(changed) == 2


def test_the_outcome_says_what_was_done(edited: tuple[Any, ...]) -> None:
    model, _, _, outcome = edited
    assert isinstance(outcome, Outcome)
    assert [entry.id for entry in outcome.ledger.entries] == [r.id for r in tiny_requests()]
    assert outcome.success == (outcome.final["efficacy"]["accuracy"] == 1.0)
    assert outcome.final["efficacy"]["success"] > outcome.base["efficacy"]["success"] or outcome.success
    assert outcome.final["efficacy"]["magnitude"] > outcome.base["efficacy"]["magnitude"]
    assert outcome.base["locality"]["agreement"] == 1.0
    again = summarise(evaluate_edits(ModelAdapter(model), tiny_tokenizer(), tiny_requests()))
    # The stream multiplies with whichever kernel it has found to be the faster one, this adapter with torch's.
    assert again["efficacy"] == pytest.approx(outcome.final["efficacy"], abs=SINGLE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_says_the_new_objects(family: str) -> None:
    """With the subject last, the head reads the fitted state: even a random model says an object of one token."""
    facts = [
        {"prompt": f"The capital of {who}", "subject": who, "target_new": new}
        for who, new in (("Italy", "Japan"), ("Hamlet", "chess"), ("Serena Williams", "Fuji"))
    ]
    model, before = tiny_model(family), weights(tiny_model(family))
    _, outcome = lit_edit.edit(model, tiny_tokenizer(), facts, editor(layers=[2]))
    assert outcome.base["efficacy"]["accuracy"] < 1.0
    assert outcome.success
    outcome.ledger.restore_base()
    assert same(model, before) == list(before)


def test_restoring_brings_every_weight_back_bit_for_bit() -> None:
    model = tiny_model()
    before = weights(model)
    _, outcome = lit_edit.edit(model, tiny_tokenizer(), MAPPINGS, editor())
    assert len(same(model, before)) < len(before)
    outcome.ledger.restore_base()
    assert same(model, before) == list(before)
    assert len(outcome.ledger) == 0


def test_mappings_and_requests_may_be_mixed_and_edit_alike() -> None:
    first, second = tiny_model(), tiny_model()
    as_requests = [EditRequest.from_text(str(i), **fact) for i, fact in enumerate(MAPPINGS, 1)]
    lit_edit.edit(first, tiny_tokenizer(), MAPPINGS, editor())
    lit_edit.edit(second, tiny_tokenizer(), [as_requests[0], MAPPINGS[1]], editor())
    assert len(same(first, weights(second))) == len(weights(second))


@pytest.mark.parametrize("window", [1, 2, 8])
def test_the_window_does_not_change_the_result(window: int) -> None:
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    lit_edit.edit(reference, tiny_tokenizer(), MAPPINGS, editor(), window=5)
    lit_edit.edit(model, tiny_tokenizer(), MAPPINGS, editor(), window=window)
    for name, value in model.named_parameters():
        assert_near(value, reference.get_parameter(name), rounding("llama"))  # fitted in passes of other shapes


@pytest.mark.parametrize("kind", [D4S, MEMIT])
def test_a_model_as_users_have_it_is_edited_without_gradients(kind: type) -> None:
    """Trainable and in training mode."""
    model, frozen = tiny_model().requires_grad_(True).train(), tiny_model()
    lit_edit.edit(model, tiny_tokenizer(), MAPPINGS, editor(kind))
    lit_edit.edit(frozen, tiny_tokenizer(), MAPPINGS, editor(kind))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert len(same(model, weights(frozen))) == len(weights(frozen))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    lit_edit.edit(tiny_model(), tiny_tokenizer(), MAPPINGS[:1], editor(contexts="sampled"))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"prompt": "The capital is", "subject": "Peru", "target_new": "x"}, "request 2: the subject 'Peru'"),
        ({"prompt": "Peru is"}, "request 2: missing field"),
        ("text", "request 2: expected a record"),
        ({"prompt": "Peru is", "subject": "Peru", "target_new": " "}, "request 2: target_new is empty"),
    ],
)
def test_a_broken_request_names_its_number_and_nothing_is_edited(broken: Any, what: str) -> None:
    model = tiny_model()
    before = weights(model)
    with pytest.raises(DataError, match=what):
        lit_edit.edit(model, tiny_tokenizer(), [MAPPINGS[0], broken], editor())
    assert same(model, before) == list(before)


@pytest.mark.parametrize(
    ("requests", "what"),
    [([], "there are no requests"), ([tiny_requests()[0], replace(tiny_requests()[1], id="0")], "the same id")],
)
def test_none_and_duplicates_are_refused(requests: list[EditRequest], what: str) -> None:
    with pytest.raises(DataError, match=what):
        lit_edit.edit(tiny_model(), tiny_tokenizer(), requests, editor())


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="window must be at least 1"):
        lit_edit.edit(tiny_model(), tiny_tokenizer(), MAPPINGS, editor(), window=0)


def test_a_second_call_goes_on_in_the_session_of_the_first() -> None:
    model, before = tiny_model(), weights(tiny_model())
    _, first = lit_edit.edit(model, tiny_tokenizer(), MAPPINGS[:1], editor())
    between = weights(model)
    _, second = lit_edit.edit(model, tiny_tokenizer(), MAPPINGS[1:])
    assert second.session is first.session
    assert (first.numbers, second.numbers) == ((1,), (2,))
    assert len(same(model, between)) < len(between)
    second.undo(*second.numbers)
    for name, value in between.items():
        assert_near(model.get_parameter(name), value, rounding("llama"))
    first.undo(*first.numbers)
    assert same(model, before) == list(before)


def test_an_edit_that_fails_takes_the_others_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = weights(model)
    failing = editor()
    propose, made = failing.propose, []

    def third_time(*args: Any, **options: Any) -> Any:
        made.append(args)
        if len(made) == 3:
            raise FloatingPointError("diverged")
        return propose(*args, **options)

    failing.propose = third_time  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="diverged"):
        lit_edit.edit(model, tiny_tokenizer(), tiny_requests(), failing, KeyStatistics(cache=str(tmp_path)))
    assert len(same(model, before)) == len(before)


def test_an_editor_used_again_samples_contexts_of_the_new_model(tmp_path: Path) -> None:
    again = D4S(layers=[1, 2], target=TargetSettings(steps=2))
    statistics = KeyStatistics(cache=str(tmp_path))
    templates = []
    for family in ("llama", "gpt2"):
        lit_edit.edit(tiny_model(family), tiny_tokenizer(), tiny_requests()[:1], again, statistics)
        templates.append(again.templates)
    assert templates[0] != templates[1]
