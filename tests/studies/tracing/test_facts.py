"""Facts: what files may hold, and which tokens play which part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_edit.data.request import DataError
from lit_edit.models import ModelAdapter
from lit_edit.studies.tracing import KnownFact, read_facts, tokenize_fact
from lit_edit.studies.tracing.facts import find_file
from lit_edit.studies.tracing.noise import draw_noise, embedding_deviation
from lit_edit.studies.tracing.prompts import known_facts, predict_next, role_of
from lit_edit.testing import tiny_model, tiny_tokenizer

ROW = {"known_id": 7, "prompt": "Ada is in Canada; Ada speaks", "subject": "Ada", "attribute": "French"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_records_of_the_fields_file(tmp_path: Path) -> None:
    templated = ROW | {"known_id": 8, "template": "{} is in Canada; Ada speaks"}
    other = {"prompt": "{} was born in", "subject": "Ada", "attribute": "Rome", "template": "of another wording"}
    first, second, third = read_facts(write(tmp_path / "a.json", ROW, templated, other))
    assert (first.id, first.start) == ("7", 18)  # the last whole word
    assert second.start == 0
    assert (third.id, third.prompt, third.span) == ("2", "Ada was born in", (0, 3))


def test_counterfact_says_what_is_true(tmp_path: Path) -> None:
    rewrite = {
        "prompt": "{} speaks",
        "subject": "Ada",
        "target_new": {"str": "Greek"},
        "target_true": {"str": "French"},
    }
    [fact] = read_facts(write(tmp_path / "a.json", {"case_id": 3, "requested_rewrite": rewrite}))
    assert fact == KnownFact("3", "Ada speaks", "Ada", "French", 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "subject": "a"}, "missing field attribute"),
        ({"prompt": "a", "subject": "a", "attribute": 3}, "attribute must be text, got int"),
        ({"prompt": "a b", "subject": " ", "attribute": "c"}, "subject is empty"),
        ({"prompt": "a b", "subject": "c", "attribute": "d"}, "the subject 'c' does not occur in the prompt 'a b'"),
        ({"prompt": "a b", "subject": "a", "attribute": "\ud800"}, "attribute holds half a character"),
        ({"prompt": "a", "subject": "a", "target_new": "b", "ground_truth": None}, "does not say what is true"),
        (["a"], "expected a record with fields, got list"),
        (ROW, "duplicate id '7', first used in line 1"),
    ],
)
def test_broken_records_are_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.json:1: .*{message}"):
        read_facts(write(tmp_path / "a.json", ROW, row))


def test_files_that_hold_nothing_or_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no facts to trace"):
        read_facts(write(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"none of known_facts\.json, .* put the field's file"):
        find_file("known_facts")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "known_1000.json", ROW)
    assert find_file("known_facts") == Path("data/known_1000.json")
    assert find_file("x.csv") == Path("x.csv")


def test_the_built_in_facts_are_whole() -> None:
    facts = read_facts(find_file("builtin"))
    assert len(facts) == 30
    assert len({fact.prompt for fact in facts}) == 30
    assert facts[0] == KnownFact("0", "The capital of France is", "France", "Paris", 15)


def test_all_of_the_fields_file_can_be_read(shared_data: Path) -> None:
    facts = read_facts(shared_data / "known_facts_1209.json")
    assert len(facts) == 1209
    assert all(fact.prompt[slice(*fact.span)] == fact.subject for fact in facts)


@pytest.mark.parametrize(
    ("subject", "length", "expected"),
    [
        ((0, 4), 8, ["first subject", "middle subject", "middle subject", "last subject", "first subsequent"]),
        ((0, 2), 4, ["first subject", "last subject", "first subsequent", "last"]),
        ((1, 2), 5, [None, "last subject", "first subsequent", "further", "last"]),
        ((0, 1), 2, ["last subject", "last"]),
        ((0, 2), 2, ["first subject", "last"]),
    ],
)
def test_roles(subject: tuple[int, int], length: int, expected: list[str | None]) -> None:
    roles = [role_of(position, subject, length) for position in range(length)][: len(expected)]
    short = [role and role.removesuffix("s").removesuffix(" token") for role in roles]
    assert short == expected


def test_noise_depends_on_seed_and_fact_alone() -> None:
    one, other = (tokenize_fact(tiny_tokenizer(), KnownFact("0", f"{s} is in", s, "Asia", 0)) for s in ("Oslo", "Rome"))
    first, behind = one.subject
    noise = draw_noise(one, 400, 32, 0.5, seed=3)
    assert noise.shape == (400, behind - first, 32)
    assert noise.std() == pytest.approx(0.5, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert (draw_noise(one, 400, 32, 0.5, seed=3) == noise).all()
    assert (draw_noise(one, 400, 32, 1.0, seed=3) == 2 * noise).all()
    assert (draw_noise(one, 400, 32, 0.5, seed=4) != noise).all()
    assert draw_noise(other, 1, 32, 0.5, seed=3)[0, 0, 0] != noise[0, 0, 0]


def test_the_scale_of_the_noise_is_that_of_the_subjects_embeddings() -> None:
    model = tiny_model("gemma2")  # scales its embeddings
    facts = [tokenize_fact(tiny_tokenizer(), KnownFact("0", f"{s} is in", s, "Asia", 0)) for s in ("Oslo", "Rome")]
    ids = [token for fact in facts for token in fact.ids[: fact.subject[1]]]
    numbers = model.get_input_embeddings()(torch.tensor(ids)).double().flatten().tolist()
    mean = sum(numbers) / len(numbers)
    deviation = (sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5
    assert embedding_deviation(ModelAdapter(model), facts) == (pytest.approx(deviation), 32)


def test_known_are_the_facts_whose_attribute_comes_first() -> None:
    adapter, tokenizer = ModelAdapter(tiny_model()), tiny_tokenizer()
    prompts = ["Oslo is in", "The capital of Italy is", "Rome was"]
    plain = [tokenize_fact(tokenizer, KnownFact(p, p, p.split()[-2], "x", p.index(p.split()[-2]))) for p in prompts]
    choices = [int(adapter.model(input_ids=torch.tensor([fact.ids])).logits[0, -1].argmax()) for fact in plain]
    assert predict_next(adapter, [fact.ids for fact in plain], 0) == choices
    made = [vars(f) | {"attribute": c + (f.fact.id == "Rome was")} for f, c in zip(plain, choices, strict=True)]
    facts = [type(plain[0])(**values) for values in made]
    tried: list[int] = []
    known = list(known_facts(adapter, tokenizer, facts, batch_size=2, progress=tried.append))
    assert [fact.fact.id for fact in known] == prompts[:2]
    assert tried == [2, 3]
