"""Context templates: checking, weights, and sampling."""

from __future__ import annotations

import pytest
import torch

from lit_edit.data.request import EditRequest
from lit_edit.models import ModelAdapter
from lit_edit.targets.contexts import PLAIN, STARTS, check_templates, group_weights, sample_templates
from lit_edit.targets.problem import build_problem
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation


def sample(seed: int, **settings: object) -> tuple[tuple[str, ...], ...]:
    return sample_templates(ModelAdapter(tiny_model()), tiny_tokenizer(), seed, **settings)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "at least one template"),
        ([[]], "at least one template"),
        ([["{}"], []], "at least one template"),
        ([["{}", "no place"]], "exactly one {} for the prompt, got 'no place'"),
        ([["{}"], ["{} and {}"]], "exactly one {}"),
        ([["Well. {}"]], "first context template must be the plain prompt"),
    ],
)
def test_broken_templates_are_refused(templates: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_templates(templates)


def test_templates_become_tuples() -> None:
    assert check_templates([["{}"], ["A. {}", "{} b"]]) == (("{}",), ("A. {}", "{} b"))


@pytest.mark.parametrize("sizes", [(1,), (1, 5), (1, 2, 3)])
def test_groups_weigh_the_same(sizes: tuple[int, ...]) -> None:
    weights = group_weights(tuple(("{}",) * size for size in sizes))
    assert len(weights) == sum(sizes)
    for index, size in enumerate(sizes):
        start = sum(sizes[:index])
        assert sum(weights[start : start + size]) == pytest.approx(1 / len(sizes), rel=1e-12)
        assert len(set(weights[start : start + size])) == 1


def test_memit_weights() -> None:
    """The plain prompt weighs a half, each of five prefixed ones a tenth (methods 0.3)."""
    assert group_weights((("{}",), tuple("abcde"))) == pytest.approx([0.5, *[0.1] * 5])


def test_sampled_templates_are_reproducible_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert sample(3) == first
    assert sample(4) != first


def test_sampled_templates_have_memits_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_model(), []

    def spy(ids: torch.Tensor, **settings: object) -> torch.Tensor:
        out = type(model).generate(model, ids, **settings)
        made.append((out.shape[1], settings["do_sample"], settings["top_k"]))
        return out

    monkeypatch.setattr(model, "generate", spy)
    plain, prefixed = check_templates(sample_templates(ModelAdapter(model), tiny_tokenizer(), 0))
    assert made == [(10, True, 5)] * 5  # ten tokens in all, top-k 5
    assert plain == PLAIN[0]
    assert len(prefixed) == len(STARTS) == 5
    for start, template in zip(STARTS, prefixed, strict=True):
        assert template.startswith(start)
        assert template.endswith(". {}")


@pytest.mark.parametrize("seed", range(5))
def test_sampled_text_never_breaks_a_template(seed: int) -> None:
    """The model may write braces and line breaks; a random model writes anything."""
    for template in check_templates(sample(seed, top_k=400, length=20))[1]:
        assert template.count("{") == template.count("}") == 1
        assert "\n" not in template


def test_start_longer_than_the_text_still_gives_a_template() -> None:
    long = "The headquarters of Nokia are in Finland and"
    (_, (template,)) = sample(0, starts=[long], length=3)
    assert template.startswith(long)


# ---- problems --------------------------------------------------------------------------------------------------------


def test_problem_is_the_prompt_in_every_context() -> None:
    tokenizer, request = tiny_tokenizer(), tiny_requests()[1]
    templates = (("{}",), ("I say. {}", "{} is what he said"))
    problem = build_problem(tokenizer, request, templates)
    texts = [tokenizer.decode(prompt.ids) for prompt in problem.prompts]
    assert texts == [request.text, f"I say. {request.text}", f"{request.text} is what he said"]
    for prompt in problem.prompts:
        assert tokenizer.decode(prompt.ids[: prompt.lookup + 1]).endswith("of Marie Curie")
    assert tokenizer.decode(problem.target) == " Greek"
    assert tokenizer.decode(problem.essence.ids) == "Marie Curie"
    assert problem.essence.lookup == len(problem.essence.ids) - 1


def test_subject_with_braces_stays_as_it_is() -> None:
    request = EditRequest("1", "The set {} is", "A {} B", "empty")
    problem = build_problem(tiny_tokenizer(), request, (("{}",), ("Well. {}",)))
    assert tiny_tokenizer().decode(problem.prompts[1].ids) == "Well. The set A {} B is"


@pytest.mark.parametrize("prompt", ["The capital of {} is ", "The capital of {} is\n"])
def test_prompt_that_ends_with_white_space_is_that_of_the_continuation(prompt: str) -> None:
    request = EditRequest("1", prompt, "Italy", "Vienna")
    problem = build_problem(tiny_tokenizer(), request, PLAIN)
    head, tail = continuation(tiny_tokenizer(), request.text, request.target_new)
    assert problem.prompts[0].ids == head
    assert problem.target == tail
