"""Fluency, consistency and exact match, worked out on paper for short texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_edit.data.request import DataError
from lit_edit.metrics import Consistency, ExactMatch, Fluency
from lit_edit.metrics.texts import (
    consistency,
    exact_match,
    fit_vectorizer,
    fluency,
    load_vectorizer,
    n_gram_entropy,
    read_references,
    words,
)

G = math.log(3 / 2) + 1  # weight of a word that one of two documents has; scikit-learn: ln((1 + N) / (1 + df)) + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t", []),
        ("It's Rome.", ["It's", "Rome", "."]),
        ("1,000 km/h, 3.5", ["1,000", "km/h", ",", "3.5"]),
        ("Zürich… vraiment ?", ["Zürich", "…", "vraiment", "?"]),
        ("well-known-- (no)", ["well-known", "-", "-", "(", "no", ")"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "two", "three"),
    [
        ("a b c d e", 2.0, math.log2(3)),  # ab bc cd de; abc bcd cde
        ("a b a b c", 1.5, math.log2(3)),  # ab twice of four; aba bab abc
        ("a a a a", 0.0, 0.0),  # aa thrice
        ("a a a b", math.log2(3) - 2 / 3, 1.0),  # aa 2/3, ab 1/3; aaa, aab
        ("a b", 0.0, 0.0),  # one bigram, no trigram
        ("a", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_entropy_and_fluency_by_hand(text: str, two: float, three: float) -> None:
    assert n_gram_entropy(words(text), 2) == pytest.approx(two, abs=1e-12)
    assert n_gram_entropy(words(text), 3) == pytest.approx(three, abs=1e-12)
    assert fluency([text]) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2, abs=1e-12)


def test_fluency_is_the_mean_over_texts_and_then_over_edits() -> None:
    full = 2 / 3 + 2 / 3 * math.log2(3)  # of "a b c d e"
    assert fluency(["a b c d e", ""]) == pytest.approx(full / 2)
    metric = Fluency()
    metric.update(["a b c d e", ""])
    metric.update(["a b c d e"])
    assert metric.compute().item() == pytest.approx((full / 2 + full) / 2)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one text"):
        fluency([])
    with pytest.raises(ValueError, match="at least one reference"):
        consistency(["a"], [], fit_vectorizer([["red green"]]))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        n_gram_entropy(["a"], 0)
    with pytest.raises(DataError, match="no term weights can be had from 1 reference texts"):
        fit_vectorizer([["?"]])


def test_consistency_by_hand() -> None:
    references = ("red green", "red blue")
    vectorizer = fit_vectorizer([references])
    # Said: red 1, green G. Meant, joined: red 2, green G, blue G.
    expected = (2 + G * G) / math.sqrt((1 + G * G) * (4 + 2 * G * G))
    assert consistency(["Red", "GREEN!"], references, vectorizer) == pytest.approx(expected)
    assert consistency(["red green unheard"], references, vectorizer) == pytest.approx(expected)
    assert consistency(["red green red blue"], references, vectorizer) == pytest.approx(1.0)
    assert consistency(["unheard", ""], references, vectorizer) == 0.0
    metric = Consistency(vectorizer)
    metric.update(["red green"], references)
    metric.update(["unheard"], references)
    assert metric.compute().item() == pytest.approx(expected / 2)


def test_a_text_that_edits_share_counts_once_for_the_term_weights() -> None:
    once = fit_vectorizer([["red green"], ["red blue"]])
    twice = fit_vectorizer([["red green"], ["red blue", "red green"], ["red green"]])
    assert once.idf_.tolist() == twice.idf_.tolist()
    assert dict(zip(once.get_feature_names_out(), once.idf_, strict=True)) == pytest.approx(
        {"blue": G, "green": G, "red": 1.0}
    )


def test_published_term_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({"red": 1, "green": 0}))
    np.save(tmp_path / "idf.npy", np.array([3.0, 4.0]))
    # Said: red 4, green 3. Meant: red 4.
    assert consistency(["green red"], ["red!"], load_vectorizer(tmp_path)) == pytest.approx(4 / 5)
    np.save(tmp_path / "idf.npy", np.array([3.0]))
    with pytest.raises(DataError, match=r"2 words in tfidf_vocab.json, idf.npy is \(1,\)"):
        load_vectorizer(tmp_path)
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({"red": 5}))
    with pytest.raises(DataError, match="expected an object from words to 0, 1, 2"):
        load_vectorizer(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_vectorizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("Rome", "rome", True),
        (" The  Hague.", "the Hague", True),
        ("U.S.", "us", True),
        ("Rome is", "Rome", False),
        ("", "Rome", False),
        ("a", "the", False),  # nothing is left of either
        ("A", "A", True),
        ("!", "?", False),
    ],
)
def test_exact_match(answer: str, target: str, same: bool) -> None:
    assert exact_match(answer, target) is same


def test_exact_match_is_averaged_within_an_edit_first() -> None:
    metric = ExactMatch()
    metric.update(["Rome", "Paris", "rome!", "Oslo"], "Rome")
    metric.update(["Lima"], "Lima")
    assert metric.compute().item() == 0.75
    with pytest.raises(ValueError, match="at least one answer"):
        metric.update([], "Rome")


def test_metrics_keep_their_type() -> None:
    metric = Fluency().to(torch.bfloat16)
    metric.update(["a b c d e"])
    assert metric.compute().dtype == torch.float64


def test_references_of_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "snippets.json"
    published = {"relation_id": "P1", "target_id": "Q2", "samples": [{"text": "One."}, {"text": " "}, {"text": "Two."}]}
    own = [{"target": "Rome", "text": "A city."}, {"target": "Rome", "text": "Of Italy."}]
    path.write_text(json.dumps([published, *own, {"target": "Rome", "relation": "capital", "text": "Chief."}]))
    assert read_references(path) == {
        ("P1", "Q2"): ["One.", "Two."],
        ("", "Rome"): ["A city.", "Of Italy."],
        ("capital", "Rome"): ["Chief."],
    }


@pytest.mark.parametrize(
    "record", [7, {}, {"target": "Rome"}, {"target": "Rome", "text": 7}, {"relation_id": "P1", "samples": []},
               {"relation_id": "P1", "target_id": "Q1", "samples": ["text"]}]
)  # fmt: skip
def test_broken_references_name_file_and_line(tmp_path: Path, record: object) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"target": "Rome", "text": "x"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=r"own.jsonl:2: expected {target, text} or"):
        read_references(path)
