"""Text for the key statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_edit.data.request import DataError
from lit_edit.data.texts import read_documents
from lit_edit.errors import ArgumentError
from lit_edit.files.checksum import hash_seed
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.corpus import DocumentText, SampledText, open_corpus
from lit_edit.testing import tiny_model, tiny_tokenizer

TEXTS = ["First, a sentence.", 'Second, with "quotes"', "Third\u2028line and\u0085another"]


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(tiny_model())


def sample(adapter: ModelAdapter, index: int = 0, **settings: Any) -> list[list[int]]:
    return SampledText(**{"rows": 6, "length": 20, **settings}).chunk(index, adapter, tiny_tokenizer())


def test_sampled_text_depends_on_seed_and_chunk_alone(adapter: ModelAdapter) -> None:
    torch.manual_seed(0)
    first = sample(adapter)
    torch.manual_seed(123)
    assert sample(adapter) == first
    assert sample(adapter, seed=1) != first
    assert sample(adapter, index=1) != first


def test_sampling_leaves_the_global_random_state_alone(adapter: ModelAdapter) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    sample(adapter)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_row_has_its_length_and_starts_with_an_opening(adapter: ModelAdapter) -> None:
    rows = sample(adapter, rows=9, length=33)
    assert [len(row) for row in rows] == [33] * 9
    assert tiny_tokenizer().eos_token_id not in {token for row in rows for token in row}
    openings = tuple(SampledText().starts)
    assert all(tiny_tokenizer().decode(row).startswith(openings) for row in rows)


def test_fingerprints_name_all_that_changes_the_text() -> None:
    settings: list[dict[str, Any]] = [{}, {"seed": 1}, {"rows": 7}, {"length": 9}, {"top_k": 3}, {"starts": ("A",)}]
    names = [SampledText(**setting).fingerprint() for setting in settings]
    assert len(set(names)) == len(settings)
    assert SampledText().fingerprint() == names[0]
    documents = [DocumentText(["a", "b"], "x"), DocumentText(["ab"], "x"), DocumentText(["a", "b"], "y")]
    documents += [DocumentText(["a", "b"], "x", rows=1), DocumentText(["a", "b"], "x", length=1)]
    assert len({d.fingerprint() for d in documents}) == len(documents)


def test_documents_are_cut_into_chunks_and_to_length(adapter: ModelAdapter) -> None:
    corpus = DocumentText(["a b c d e f", "g", " ", "h"], "x", rows=2, length=3)
    chunks = [corpus.chunk(i, adapter, tiny_tokenizer()) for i in range(3)]
    assert [[len(row) for row in chunk] for chunk in chunks] == [[3, 1], [1], []]


def written(folder: Path, kind: str, field: str = "text", bom: bool = False) -> Path:
    path = folder / f"corpus.{kind}"
    rows = [{field: text} for text in TEXTS]
    content = {
        "json": json.dumps(rows, ensure_ascii=False),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "csv": "\n".join([f"id,{field}", *(f'{i},"{t.replace(chr(34), chr(34) * 2)}"' for i, t in enumerate(TEXTS))])
        + "\n",
    }[kind.lower()]
    path.write_text(content, "utf-8-sig" if bom else "utf-8")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "JSONL"])
@pytest.mark.parametrize("field", ["text", "Text"])
@pytest.mark.parametrize("bom", [False, True])
def test_records_with_a_text_field(tmp_path: Path, kind: str, field: str, bom: bool) -> None:
    assert read_documents(written(tmp_path, kind, field, bom)) == TEXTS


def test_plain_text_is_a_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("One.\n\n  \nTwo.\r\nThree.", "utf-8-sig")
    assert read_documents(path) == ["One.", "Two.", "Three."]


def test_a_json_list_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('["One.", "", {"text": "Two."}, {"other": "x"}, 7, null]')
    assert read_documents(path) == ["One.", "Two."]


def test_csv_cells_keep_their_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text('text\n"One\ntwo."\n')
    assert read_documents(path) == ["One\ntwo."]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b" \n\n"),
        ("a.json", b"{"),
        ("a.json", b'{"text": "no list"}'),
        ("a.json", b"[" * 100_000),
        ("a.json", b"[" + b"9" * 5000 + b"]"),
        ("a.jsonl", b'{"text": "good"}\n{"text": '),
        ("a.jsonl", b'{"body": "x"}'),
        ("a.csv", b"body\nx\n"),
        ("a.csv", b"text\n" + b"x" * 200_000),
        ("a.txt", b"\xff\xfe"),
        ("a.csv", b""),
    ],
)
def test_files_without_text_are_data_errors_that_name_them(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)


def test_open_corpus_knows_files_and_refuses_the_rest(tmp_path: Path) -> None:
    corpus = open_corpus(str(written(tmp_path, "json")), seed=0)
    assert isinstance(corpus, DocumentText)
    assert corpus.documents == TEXTS
    assert isinstance(open_corpus("sampled", seed=4), SampledText)
    for name in ("absent", "./absent/file", "/absent/file.txt", "absent/file.txt"):
        with pytest.raises(ArgumentError, match="neither 'sampled', nor an existing file"):
            open_corpus(name, seed=0)


def test_seeds_from_parts_are_stable_and_apart() -> None:
    assert hash_seed(0, 1) == hash_seed(0, 1)
    assert len({hash_seed(a, b) for a in range(5) for b in range(5)}) == 25
    assert all(0 <= hash_seed(a) < 2**63 for a in range(50))


def test_shared_text_is_enough_for_a_corpus(shared_data: Path) -> None:
    texts = read_documents(shared_data / "text_4k.json")
    assert len(texts) == 4000
