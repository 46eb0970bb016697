"""Lookup tokens and continuations for any text, over tokenizers of every build."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lit_edit.data.request import DataError, EditRequest, find_subject
from lit_edit.text.tokens import continuation, encode, leading_tokens, locate, pad_right
from tests.text.test_tokens import BUILDERS, build

MANY = settings(max_examples=60, deadline=None, database=None, derandomize=True)

# Letters of one to four bytes, marks that combine, scripts that run the other way, and no "<": a text may well spell
# a special token. The replacement character is what half a letter decodes to.
LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<\ufffd")
TEXT = st.text(LETTERS, max_size=12)
WORDS = TEXT.map(str.strip).filter(bool)
FAMILIAR = st.sampled_from(
    ["Rome", "São Tomé", "東京", "🗼", "👩‍🚀 Ada", "Ελλάδα", "e\u0301", "a b", "Nokia", "is", "'s", "42"]
)
SUBJECT = WORDS | FAMILIAR

every_tokenizer = pytest.mark.parametrize("name", sorted(BUILDERS))
whole_bytes = pytest.mark.parametrize("name", ["bytes", "bytes+bos", "bytes+bos+eos"])  # decode to what was encoded


def says(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    """What ids spell, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@st.composite
def placed(draw: st.DrawFn) -> tuple[str, int, int]:
    """A text and a span in it: a subject at the start, in the middle, at the end, alone, or among others of itself."""
    subject = draw(SUBJECT)
    around = st.sampled_from(["", f"{subject} ", f"{subject}", f" {subject}", f"The {subject}, "]) | TEXT
    before, after = draw(around), draw(around)
    return before + subject + after, len(before), len(before) + len(subject)


@whole_bytes
@MANY
@given(place=placed())
def test_the_lookup_token_completes_the_subject(name: str, place: tuple[str, int, int]) -> None:
    """Checked by decoding: with the lookup token the subject is complete, without it it is not."""
    tokenizer, (text, start, end) = build(name), place
    located = locate(tokenizer, text, (start, end))
    assert located.ids == encode(tokenizer, text)
    assert says(tokenizer, located.ids[: located.lookup + 1]).startswith(text[:end])
    assert not says(tokenizer, located.ids[: located.lookup]).startswith(text[:end])


@every_tokenizer
@MANY
@given(place=placed())
def test_the_lookup_token_is_the_last_that_covers_the_subjects_last_character(
    name: str, place: tuple[str, int, int]
) -> None:
    tokenizer, (text, start, end) = build(name), place
    located = locate(tokenizer, text, (start, end))
    lead = len(leading_tokens(tokenizer))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(located.ids) == lead + len(offsets)
    first, last = offsets[located.lookup - lead]
    assert first < end <= last
    assert all(not (a < end <= b) for a, b in offsets[located.lookup - lead + 1 :])


@every_tokenizer
@MANY
@given(place=placed())
def test_what_stands_behind_the_subject_does_not_move_an_earlier_lookup(name: str, place: tuple[str, int, int]) -> None:
    """A second subject in the text has a lookup token of its own, no earlier than the first one's."""
    tokenizer, (text, start, end) = build(name), place
    joined = f"{text} and {text}"
    first = locate(tokenizer, joined, (start, end))
    second = locate(tokenizer, joined, (len(text) + 5 + start, len(text) + 5 + end))
    assert first.ids == second.ids
    assert first.lookup < second.lookup


@MANY
@given(place=placed())
@example(place=("New York New York New York", 0, 17))  # the second one begins before the first one ends
def test_a_request_finds_its_subject_wherever_it_stands(place: tuple[str, int, int]) -> None:
    """``from_text`` takes the last whole word, or the last occurrence; its span and its text hold the subject."""
    text, start, end = place
    subject = text[start:end]
    assume("{}" not in text)
    text = text.strip()
    request = EditRequest.from_text("1", text, subject, "new")
    assert request.text == text
    begin, stop = request.subject_span
    assert text[begin:stop] == subject
    places = [at for at in range(len(text)) if text.startswith(subject, at)]
    whole = [
        at for at in places if not re.match(r"\w", text[at - 1 : at]) and not re.match(r"\w", text[at + stop - begin :])
    ]
    assert begin == find_subject(text, subject) == (whole or places)[-1]


@every_tokenizer
@MANY
@given(prompt=TEXT, target=TEXT)
def test_a_continuation_is_the_joined_text_cut_or_both_apart(name: str, prompt: str, target: str) -> None:
    assume(prompt.strip() and target.strip())
    tokenizer = build(name)
    head, tail = continuation(tokenizer, prompt, target)
    prompt, target = prompt.rstrip(), target.strip()
    together = encode(tokenizer, f"{prompt} {target}")
    apart = tuple(tokenizer(f" {target}", add_special_tokens=False)["input_ids"])
    assert tail
    assert len(head) > len(leading_tokens(tokenizer))
    assert head + tail == together or (head, tail) == (encode(tokenizer, prompt), apart)


@whole_bytes
@MANY
@given(prompt=TEXT, target=TEXT)
def test_a_continuation_spells_prompt_and_target(name: str, prompt: str, target: str) -> None:
    assume(prompt.strip() and target.strip())
    tokenizer = build(name)
    head, tail = continuation(tokenizer, prompt, target)
    assert says(tokenizer, head) == prompt.rstrip()
    assert says(tokenizer, tail) == f" {target.strip()}"
    assert head[: len(leading_tokens(tokenizer))] == leading_tokens(tokenizer)


@every_tokenizer
@pytest.mark.parametrize(("prompt", "target"), [("Rome is", ""), ("Rome is", "  "), ("", "Asia"), (" ", "Asia")])
def test_a_continuation_of_nothing_is_refused_or_begins_with_special_tokens(
    name: str, prompt: str, target: str
) -> None:
    tokenizer = build(name)
    if target.strip() and leading_tokens(tokenizer):
        assert continuation(tokenizer, prompt, target)[0] == leading_tokens(tokenizer)
        return
    with pytest.raises(DataError, match="this tokenizer makes no token of"):
        continuation(tokenizer, prompt, target)


@MANY
@given(
    rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), min_size=1, max_size=5), pad=st.integers(0, 9)
)
def test_padding_keeps_every_row(rows: list[list[int]], pad: int) -> None:
    ids, mask = pad_right(rows, pad, torch.device("cpu"))
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, padded, kept in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert padded == row + [pad] * (len(padded) - len(row))
        assert kept == [1] * len(row) + [0] * (len(padded) - len(row))
