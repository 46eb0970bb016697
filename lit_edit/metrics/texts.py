"""Metrics of generated texts: n-gram entropy (fluency), TF-IDF similarity (consistency), normalised exact match."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lit_edit.data.files import read_file, read_text
from lit_edit.data.request import DataError
from lit_edit.errors import check_least

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

N_GRAM_WEIGHTS = ((2, 1 / 3), (3, 2 / 3))
"""Shares of the entropies: the published weights 2/3 and 4/3, averaged over the two (arXiv 2202.05262)."""

_WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\w+(?:(?:[.'’/-]|(?<=\d),(?=\d))\w+)*|\.{2,}|[^\w\s]")


def words(text: str) -> list[str]:
    """Cut a text into words and marks.

    The published code uses nltk's ``word_tokenize``, which needs data to be fetched; this is a regular expression. A
    word is a run of letters and digits with what apostrophes, hyphens, points and slashes join, and commas between
    digits; single letters keep their points; a run of full stops is one mark, every other mark stands alone. The one
    difference that matters: nltk parts "don't" into "do" and "n't", and this does not.

    Example:
        >>> words("Well-known: it's 1,000.5 km... (or so).")
        ['Well-known', ':', "it's", '1,000.5', 'km', '...', '(', 'or', 'so', ')', '.']
        >>> words("the 20th, in the U.S. and/or 1,2")
        ['the', '20th', ',', 'in', 'the', 'U.S.', 'and/or', '1,2']
    """
    return _WORD.findall(text)


def n_gram_entropy(tokens: Sequence[str], n: int) -> float:
    """Return the Shannon entropy of the n-grams of a text's words, in bits; 0 where there is none.

    Example:
        >>> n_gram_entropy(["a", "b", "a", "b", "c"], 2)  # ab twice, ba and bc once
        1.5
    """
    return bits(n_grams(tokens, n))


def n_grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a text, in order."""
    check_least(1, n=n)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def bits(things: Iterable[Hashable]) -> float:
    """Return the Shannon entropy of the distribution of some things, in bits; 0 of none."""
    counts = Counter(things)
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def fluency(texts: Sequence[str]) -> float:
    """Mean weighted n-gram entropy of texts (GE of CounterFact): a third of H2 and two thirds of H3, in bits.

    Low values are texts that repeat themselves. The published code yields NaN or -0 for texts of fewer than three
    words; here an n-gram that does not exist has no entropy, so that a model that falls silent is not left out but
    counts as what it is. Texts, at least one, are measured with their prompts. Tables show this times 100.

    Example:
        >>> fluency(["one two three four"]) == math.log2(3) / 3 + 2 * math.log2(2) / 3
        True
        >>> fluency(["", "word"])
        0.0
    """
    if not texts:
        raise ValueError("fluency needs at least one text")
    return sum(
        weight * n_gram_entropy(tokens, n) for tokens in map(words, texts) for n, weight in N_GRAM_WEIGHTS
    ) / len(texts)


def fit_vectorizer(references: Sequence[Sequence[str]]) -> TfidfVectorizer:
    """Fit term weights on the reference texts of edits: scikit-learn's TF-IDF, a document per different text.

    Raises:
        DataError: If the texts hold no word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    documents = list(dict.fromkeys(chain.from_iterable(references)))
    vectorizer = TfidfVectorizer()
    try:
        return vectorizer.fit(documents)
    except ValueError as error:
        raise DataError(
            f"consistency: no term weights can be had from {len(documents)} reference texts: {error}"
        ) from None


def load_vectorizer(folder: Path) -> TfidfVectorizer:
    """Read the published term weights: ``idf.npy`` and ``tfidf_vocab.json``.

    Raises:
        DataError: If they cannot be read or do not fit each other.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    place = folder / "tfidf_vocab.json"
    try:
        vocabulary = json.loads(read_text(place))
        idf = np.array(np.lib.format.open_memmap(folder / "idf.npy", mode="r"))  # numbers alone can be mapped
    except (ValueError, OSError) as error:
        raise DataError(f"{folder}: expected idf.npy and tfidf_vocab.json: {error}") from None
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise DataError(f"{place}: expected an object from words to 0, 1, 2, ...")
    if idf.shape != (len(vocabulary),):
        raise DataError(f"{folder}: {len(vocabulary)} words in tfidf_vocab.json, idf.npy is {idf.shape}")
    vectorizer = TfidfVectorizer(vocabulary=vocabulary)
    vectorizer.idf_ = idf
    return vectorizer


def consistency(texts: Sequence[str], references: Sequence[str], vectorizer: TfidfVectorizer) -> float:
    """Cosine between the TF-IDF vectors of all texts joined and of all references joined (RS of CounterFact).

    Texts are about the subject, with their prompts; references, at least one, about the new object. It is in [0, 1], 0
    where they share no known word. Tables show this times 100.

    Example:
        >>> references = ["red green"]
        >>> weights = fit_vectorizer([references])
        >>> round(consistency(["green red!"], references, weights), 6), consistency(["blue"], references, weights)
        (1.0, 0.0)
    """
    if not references:
        raise ValueError("consistency needs at least one reference text")
    said, meant = vectorizer.transform([" ".join(texts), " ".join(references)])
    # Its rows have length one, or zero where nothing is known; rounding may leave the product a trifle above one.
    return min(1.0, float(said.multiply(meant).sum()))


def normalise(answer: str) -> str:
    """Return an answer in small letters, without marks, English articles and doubled spaces, as SQuAD compares them.

    Example:
        >>> normalise(" The  U.S. president.")
        'us president'
    """
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, target: str) -> bool:
    """Tell whether two answers are the same but for case, marks, articles and spaces.

    Example:
        >>> exact_match(" the Hague.", "The Hague"), exact_match("Hague", "Vienna")
        (True, False)
    """
    # A target of nothing but such things is compared as it stands: everything empty would match it else.
    wanted = normalise(target)
    return normalise(answer) == wanted if wanted else answer.strip() == target.strip()


def read_references(path: Path) -> dict[tuple[str, str], list[str]]:
    """Read reference texts: CounterFact's ``attribute_snippets.json``, or records of ``{target, text}``.

    Published records are ``{relation_id, target_id, samples: [{text}]}``; of your own ``{target, text}``, with
    ``relation`` if it matters. The texts come by ``(relation, target's id or name)``; a relation not given is empty.

    Raises:
        DataError: If a record is neither; names file and line.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for line, record in read_file(path):
        if isinstance(record, DataError):
            raise DataError(f"{path}:{line}: {record}")
        try:
            key, texts = _reference(record)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise DataError(
                f"{path}:{line}: expected {{target, text}} or {{relation_id, target_id, samples: [{{text}}]}}"
            ) from None
        found.setdefault(key, []).extend(text for text in texts if text.strip())
    return found


def _reference(record: object) -> tuple[tuple[str, str], list[str]]:
    if not isinstance(record, dict):
        raise TypeError
    if "samples" in record:
        key, texts = (record["relation_id"], record["target_id"]), [sample["text"] for sample in record["samples"]]
    else:
        key, texts = (record.get("relation") or "", record["target"]), [record["text"]]
    if not all(isinstance(part, str) for part in (*key, *texts)):
        raise TypeError
    return key, texts
