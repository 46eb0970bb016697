"""The stream of edits: batches, windows at fixed places, and a cursor that survives a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_edit.data.datamodule import EditBatch, EditDataModule, StreamLoader
from lit_edit.data.request import DataError, EditRequest, Probe
from lit_edit.testing import tiny_requests

FUZZ = settings(max_examples=40, deadline=None, database=None)


def requests(count: int) -> list[EditRequest]:
    return [EditRequest(str(i), "{} is", f"subject {i}", "new") for i in range(count)]


def numbers(batches: list[EditBatch]) -> list[tuple[str, str]]:
    """Ids of batch and window, as digits."""
    return [(" ".join(r.id for r in b.requests), " ".join(r.id for r in b.window)) for b in batches]


@pytest.mark.parametrize(
    ("count", "batch_size", "window", "expected"),
    [
        (5, 1, 1, [("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"), ("4", "4")]),
        (5, 1, 2, [("0", "0 1"), ("1", "0 1"), ("2", "2 3"), ("3", "2 3"), ("4", "4")]),
        (5, 2, 4, [("0 1", "0 1 2 3"), ("2 3", "0 1 2 3"), ("4", "4")]),
        (7, 2, 5, [("0 1", "0 1 2 3"), ("2 3", "0 1 2 3"), ("4 5", "4 5 6"), ("6", "4 5 6")]),
        (5, 3, 1, [("0 1 2", "0 1 2"), ("3 4", "3 4")]),
        (3, 5, 8, [("0 1 2", "0 1 2")]),
        (0, 2, 2, []),
    ],
)
def test_batches_and_windows(count: int, batch_size: int, window: int, expected: list[tuple[str, str]]) -> None:
    loader = StreamLoader(requests(count), batch_size, window)
    assert numbers(list(loader)) == expected
    assert len(loader) == len(expected)


@FUZZ
@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 9), st.integers(0, 40))
def test_a_resumed_stream_goes_on_with_the_same_batches_and_windows(
    count: int, batch_size: int, window: int, stop: int
) -> None:
    stream = requests(count)
    whole = list(StreamLoader(stream, batch_size, window))
    first = StreamLoader(stream, batch_size, window)
    made = [batch for batch, _ in zip(first, range(stop), strict=False)]
    state = json.loads(json.dumps({"cursor": len(made)}))
    second = StreamLoader(stream, batch_size, window)
    second.load_state_dict(state)
    assert numbers([*made, *second]) == numbers(whole)
    assert len(second) == len(whole)
    assert [r for batch in whole for r in batch.requests] == stream
    assert all(request in batch.window for batch in whole for request in batch.requests)


def test_the_cursor_counts_steps_handed_out() -> None:
    loader = StreamLoader(requests(5), 2, 2)
    assert loader.state_dict() == {"cursor": 0}
    iterator = iter(loader)
    for step in (1, 2, 3):
        next(iterator)
        assert loader.state_dict() == {"cursor": step}
    assert next(iterator, None) is None
    assert loader.state_dict() == {"cursor": 3}


def test_a_loaded_cursor_is_kept_until_iterated_and_then_forgotten() -> None:
    loader = StreamLoader(requests(4))
    loader.load_state_dict({"cursor": 3})
    assert loader.state_dict() == {"cursor": 3}
    assert len(loader) == 4
    assert [b.requests[0].id for b in loader] == ["3"]
    assert [b.requests[0].id for b in loader] == ["0", "1", "2", "3"]  # a second epoch starts at the beginning


def test_a_cursor_at_the_end_leaves_nothing_to_do() -> None:
    loader = StreamLoader(requests(4), 2)
    loader.load_state_dict({"cursor": 2})
    assert list(loader) == []


@pytest.mark.parametrize(
    ("name", "value"), [("limit", 0), ("offset", -1), ("batch_size", 0), ("target_window", 0), ("limit", -3)]
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{name} must be at least \d, got {value}"):
        EditDataModule(**{name: value})


def test_from_requests_keeps_the_order_and_the_options() -> None:
    data = EditDataModule.from_requests(tiny_requests(), batch_size=4, target_window=2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.requests == tuple(tiny_requests())
    assert (loader.batch_size, loader.window) == (4, 4)
    assert data.perplexity_texts


def test_from_requests_takes_a_part_and_shuffles() -> None:
    ids = [r.id for r in tiny_requests()]
    assert [r.id for r in EditDataModule.from_requests(tiny_requests(), offset=1, limit=2).requests] == ids[1:3]
    shuffled = [r.id for r in EditDataModule.from_requests(tiny_requests(), shuffle_seed=1).requests]
    assert sorted(shuffled) == sorted(ids)
    assert shuffled != ids
    with pytest.raises(DataError, match=r"data\.offset=99"):
        EditDataModule.from_requests(tiny_requests(), offset=99)


def test_empty_probes_are_refused() -> None:
    with pytest.raises(DataError, match="prompt is empty"):
        Probe(" ", "Rome")
    with pytest.raises(DataError, match="answer is empty"):
        Probe("The capital of Italy is", "")


def test_from_requests_refuses_none_and_duplicates() -> None:
    with pytest.raises(DataError, match="no edits to make"):
        EditDataModule.from_requests([])
    with pytest.raises(DataError, match="duplicate id '2'"):
        EditDataModule.from_requests([*tiny_requests(), tiny_requests()[2]])


def order(seed: int | None) -> list[str]:
    return [r.id for r in EditDataModule(shuffle_seed=seed).read().requests]


def test_shuffling_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    first = order(1)
    torch.manual_seed(1)
    assert order(1) == first != order(2)
    assert sorted(first) == sorted(order(None))
    assert order(None) == order(None) != first


def test_reading_twice_changes_nothing() -> None:
    data = EditDataModule(shuffle_seed=3)
    assert [r.id for r in data.read().requests] == [r.id for r in data.read().requests] == order(3)


def test_perplexity_texts_come_from_a_file_and_skipped_records_are_kept(tmp_path: Path) -> None:
    texts, edits = tmp_path / "texts.jsonl", tmp_path / "edits.jsonl"
    texts.write_text('{"text": "One sentence."}\n{"Text": "Another."}\n')
    edits.write_text('{"prompt": "Italy is", "subject": "Italy", "target_new": "x"}\n{}\n')
    data = EditDataModule("file", str(edits), on_error="skip", perplexity_path=str(texts)).read()
    assert data.perplexity_texts == ["One sentence.", "Another."]
    assert len(data.requests) == len(data.skipped) == 1


def test_measurement_loaders_hold_every_edit_once() -> None:
    data = EditDataModule(batch_size=5).read()
    for loader in (data.test_dataloader(), data.val_dataloader()):
        assert [r for batch in loader for r in batch.requests] == data.requests
