"""Lookup tokens and continuations over tokenizers of every build."""

from __future__ import annotations

import json
import string
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from lit_edit.testing import tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import check_tokenizer, continuation, encode, leading_tokens, locate, pad_right, pad_token

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXTS = [f"{r.text} {r.target_new} {r.target_true}" for r in tiny_requests()] * 3


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def with_template(single: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, putting special tokens around every text."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return wrap(backend)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A Unigram model as SentencePiece makes them."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted(set("".join(UNICODE)) | set(string.printable) - set(string.whitespace))  # nothing is unknown
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """A BPE model with Metaspace and byte fallback, as Llama-2 has it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend)


UNICODE = ["São Tomé", "Zürich", "東京", "Bjørk Guðmundsdóttir", "Ελλάδα", "🗼", "👩‍🚀 Ada", "Café 🗼"]

BUILDERS = {
    "bytes": lambda: with_template("$A"),
    "bytes+bos": lambda: with_template("<s> $A"),
    "bytes+bos+eos": lambda: with_template("<s> $A </s>"),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-first": lambda: metaspace("first"),
    "byte-fallback": byte_fallback,
}
LEAD = {name: (1,) if name != "bytes" else () for name in BUILDERS}


@cache
def build(name: str) -> PreTrainedTokenizerFast:
    return BUILDERS[name]()


every_tokenizer = pytest.mark.parametrize("name", sorted(BUILDERS))

PLACES = [
    ("{} is located in", "Mount Fuji"),
    ("The mother tongue of {} is", "Marie Curie"),
    ("In the end it was {}", "Nokia"),
    ("The book {}, by the way, was", "Hamlet"),
    ('They call "{}" great', "Serena Williams"),
    ("Nothing about {}'s sister is", "Chopin"),
    *[
        (f"{before}{{}}{after}", subject)
        for subject in UNICODE
        for before, after in (("", " is in"), ("About ", ", we"))
    ],
]


def says(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...], text: str) -> bool:
    """Whether the ids spell at least ``text``."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).startswith(text)


@every_tokenizer
@pytest.mark.parametrize(("prompt", "subject"), PLACES)
def test_lookup_is_the_token_that_completes_the_subject(name: str, prompt: str, subject: str) -> None:
    """Checked by decoding, not by offsets: with the lookup token the subject is complete, without it it is not."""
    tokenizer = build(name)
    text, start = prompt.replace("{}", subject), prompt.index("{}")
    end = start + len(subject)
    located = locate(tokenizer, text, (start, end))
    assert located.ids == encode(tokenizer, text)
    assert says(tokenizer, located.ids[: located.lookup + 1], text[:end])
    assert not says(tokenizer, located.ids[: located.lookup], text[:end])
    assert says(tokenizer, located.ids, text)


@every_tokenizer
def test_unicode_subjects_are_really_split(name: str) -> None:
    """The cases above are only worth something if one character takes several tokens somewhere."""
    ids = build(name)("🗼", add_special_tokens=False)["input_ids"]
    assert 3 not in ids  # <unk>
    if name.startswith("byte"):
        assert len(ids) >= 4


@every_tokenizer
def test_subject_that_occurs_twice_is_taken_where_the_span_says(name: str) -> None:
    tokenizer, text = build(name), "Hamlet the prince and Hamlet the book"
    first, second = locate(tokenizer, text, (0, 6)), locate(tokenizer, text, (22, 28))
    assert first.ids == second.ids
    assert first.lookup < second.lookup
    assert says(tokenizer, second.ids[: second.lookup + 1], "Hamlet the prince and Hamlet")
    assert not says(tokenizer, second.ids[: second.lookup], "Hamlet the prince and Hamlet")


@every_tokenizer
def test_subject_inside_a_longer_word(name: str) -> None:
    tokenizer, text = build(name), "The Nokias are phones"
    located = locate(tokenizer, text, (4, 9))
    assert says(tokenizer, located.ids[: located.lookup + 1], "The Nokia")
    assert not says(tokenizer, located.ids[: located.lookup], "The Nokia")


def test_span_that_no_token_covers_is_refused() -> None:
    with pytest.raises(ValueError, match="no token covers the end of"):
        locate(build("bytes"), "Rome", (0, 9))


# ---- special tokens --------------------------------------------------------------------------------------------------


@every_tokenizer
def test_leading_tokens(name: str) -> None:
    tokenizer = build(name)
    assert leading_tokens(tokenizer) == LEAD[name]
    ids = encode(tokenizer, "The capital of Italy is")
    assert ids[: len(LEAD[name])] == LEAD[name]
    assert ids[-1] != tokenizer.eos_token_id
    whole = tuple(tokenizer("The capital of Italy is")["input_ids"])
    assert ids == (whole[:-1] if name == "bytes+bos+eos" else whole)


# ---- continuations ---------------------------------------------------------------------------------------------------

PAIRS = [
    ("The capital of Italy is", "Vienna"),
    ("The capital of Italy is", "  Vienna, of course "),
    ("The capital of Italy is  ", "Vienna"),
    ("Marie Curie's mother tongue is", "Ελλάδα 東京 🗼"),
    ("He said:", "Rome"),
    ('He said "Rome" and', "42"),
    ("東京", "Japan"),
    ("🗼", "🗼"),
]


@every_tokenizer
@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_continuation_joins_like_the_whole_text(name: str, prompt: str, target: str) -> None:
    tokenizer = build(name)
    head, tail = continuation(tokenizer, prompt, target)
    assert head + tail == encode(tokenizer, f"{prompt.rstrip()} {target.strip()}")
    assert head == encode(tokenizer, prompt.rstrip())
    assert len(tail) > 0
    assert says(tokenizer, head + tail, f"{prompt.rstrip()} {target.strip()}")


def spanning(pieces: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer without pre-tokenizer, whose tokens may span spaces."""
    letters = sorted(set("".join(pieces)) | {" "})
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters, *(a + b for a, b in merges)])}
    return wrap(Tokenizer(models.BPE(vocab=vocab, merges=merges)))


def test_token_that_spans_the_border_takes_prompt_and_target_apart() -> None:
    """``is R`` is one token here: cut in the middle of it, prompt and target must still spell themselves."""
    tokenizer = spanning(["it is Rome"], [("i", "s"), ("is", " "), ("is ", "R")])
    assert "is R" in tokenizer.convert_ids_to_tokens(tokenizer("it is Rome")["input_ids"])
    head, tail = continuation(tokenizer, "it is", "Rome")
    spell = lambda ids: "".join(tokenizer.convert_ids_to_tokens(list(ids)))  # noqa: E731
    assert spell(head) == "it is"
    assert spell(tail) == " Rome"


def test_prompt_tokenised_otherwise_before_its_target_is_cut_in_the_joint_text() -> None:
    """``b `` merges before ``ab`` can: the prompt's tokens change, the border stays between two tokens."""
    tokenizer = spanning(["ab R"], [("b", " "), ("a", "b")])
    together = tokenizer("ab R")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(together) == ["a", "b ", "R"]
    head, tail = continuation(tokenizer, "ab", "R")
    tokens = [tokenizer.convert_ids_to_tokens(list(part)) for part in (head, tail)]
    assert ["".join(part) for part in tokens] == ["ab", " R"]


def test_continuation_of_several_tokens_is_whole() -> None:
    tokenizer = build("bytes+bos")
    _, tail = continuation(tokenizer, "The mother tongue of Marie Curie is", "Shakespearean xylophone")
    assert len(tail) > 3
    assert tokenizer.decode(tail) == " Shakespearean xylophone"


# ---- refusals and padding --------------------------------------------------------------------------------------------


class SlowTokenizer(PythonBackend):
    """The smallest tokenizer that transformers runs in Python."""

    @property
    def vocab_size(self) -> int:
        return 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return 0

    def _convert_id_to_token(self, index: int) -> str:
        return "a"


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SlowTokenizer is a slow tokenizer.*use_fast=True"):
        check_tokenizer(SlowTokenizer())
    check_tokenizer(build("bytes"))


def test_pad_token_falls_back() -> None:
    backend = tiny_tokenizer().backend_tokenizer
    assert pad_token(wrap(backend)) == 0
    assert pad_token(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")) == 2
    assert pad_token(PreTrainedTokenizerFast(tokenizer_object=backend)) == 0


def test_pad_right() -> None:
    ids, mask = pad_right([(5, 6, 7), (8,)], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
