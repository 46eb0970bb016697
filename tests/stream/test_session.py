"""Edits taken out, put back, replaced and refused: weights, history and journal stay one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit import D4S, EditRequest, EditStream, LanguageModel, TargetSettings
from lit_edit.data.datamodule import EditDataModule
from lit_edit.editors import MEMIT
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.editors.closed_form.key_index import KeyIndex
from lit_edit.editors.closed_form.walk import Walk
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import EditRefusedError, LayerUpdate, weights_state
from lit_edit.ledger.journal import Journal, JournalError
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.streams import FixedStatistics, make_trainer
from tests.tolerances import assert_near, rounding

REQUESTS = tiny_requests()
FAST: dict[str, Any] = {
    "covariance_weight": 5.0,
    "target": TargetSettings(steps=5),
    "contexts": [["{}"], ["Well. {}"]],
}
MODES: dict[str, tuple[type[ClosedFormEditor], dict[str, Any]]] = {
    "single": (D4S, {"layers": [1]}),
    "base": (D4S, {"layers": [1, 2], "keys": "base"}),
    "walked": (D4S, {"layers": [1, 2]}),
    "memit": (MEMIT, {"layers": [1, 2]}),
}
EXACT, APPROXIMATE = ("single", "base"), ("walked", "memit")
every_mode = pytest.mark.parametrize("mode", MODES)
exact_modes = pytest.mark.parametrize("mode", EXACT)
other_modes = pytest.mark.parametrize("mode", APPROXIMATE)
F32, F64 = torch.float32, torch.float64


def stream_of(mode: str, dtype: torch.dtype = F64, journal: Path | None = None, **options: Any) -> EditStream:
    kind, settings = MODES[mode]
    settings = {**FAST, **settings, **options.pop("settings", {})}
    model = options.pop("model", None) or tiny_model("llama", dtype)
    language_model = LanguageModel.of(model, tiny_tokenizer())
    file = None if journal is None else str(journal)
    return EditStream(language_model, kind(**settings), FixedStatistics(), journal=file, **options)


def start(mode: str = "single", dtype: torch.dtype = F64, journal: Path | None = None, **options: Any) -> EditSession:
    """A session at the end of its journal."""
    return stream_of(mode, dtype, journal, **options).open()


def make(session: EditSession, requests: Sequence[EditRequest] = REQUESTS, batch: int = 1) -> EditSession:
    """Make edits; targets are fitted step by step, so that other edits of a window do not bear on their round-off."""
    for first in range(0, len(requests), batch):
        step = requests[first : first + batch]
        proposal = session.propose(step, step)
        if proposal is not None:
            session.apply(proposal)
    return session


def requests_of(*numbers: int) -> list[EditRequest]:
    return [REQUESTS[number - 1] for number in numbers]


@cache
def never(mode: str, steps: tuple[tuple[int, ...], ...], dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """What a stream of these steps, and no others, writes."""
    session = start(mode, dtype)
    for step in steps:
        make(session, requests_of(*step), len(step))
    return dict(session.ledger.deltas)


def steps_without(out: Sequence[int], batch: int = 1) -> tuple[tuple[int, ...], ...]:
    steps = (range(first, min(first + batch, 7)) for first in range(1, 7, batch))
    return tuple(kept for step in steps if (kept := tuple(n for n in step if n not in out)))


def off(session: EditSession, expected: dict[str, Tensor]) -> float:
    """How far the updates are from others, relative."""
    assert session.ledger.deltas.keys() == expected.keys()
    found = session.ledger.deltas
    return max(float((found[n] - d).norm() / d.norm().clamp(min=1e-300)) for n, d in expected.items())


def near(batch: int) -> float:
    """How far off the same edits may be, relative, that were found in steps of this size and in others.

    One by one, all passes have the same shapes and only the solver's order differs, in float64. Beside others a target
    is fitted in passes of another shape, and Llama's norms are float32.
    """
    return 1e-8 if batch == 1 else rounding("llama")


def state_of(session: EditSession) -> dict[str, Any]:
    """Everything that a second process must arrive at, bit for bit."""
    solvers = {
        f"{layer}.{name}": value
        for layer, solver in session.editor.solvers.items()
        for name, value in solver.state_dict().items()
    }
    ledger = session.ledger
    weights = {name: value.detach().clone() for name, value in ledger.adapter.model.named_parameters()}
    known = session.editor.known.state_dict()
    return {
        **solvers,
        **weights,
        **{f"delta {name}": value for name, value in ledger.deltas.items()},
        "history": ledger.history.state_dict(),
        "sketches": known["sketches"],
        "numbers": known["numbers"],
        "position": ledger.position,
    }


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, or both no number."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (same(value, other[name]) if isinstance(value, Tensor) else value == other[name])
    ]


def holds(session: EditSession) -> list[int]:
    return [entry.number for entry in session.ledger.entries]


def weights_are_whole(session: EditSession) -> None:
    """Every edited weight is cast(W0 + delta), and delta is what the solver says."""
    ledger = session.ledger
    base = dict(tiny_model("llama", ledger.adapter.dtype).named_parameters())
    for layer, name in ledger.names.items():
        delta = ledger.deltas[name]
        expected = (base[name].double() + delta).to(base[name].dtype)
        assert torch.equal(ledger.adapter.own_weight(layer), expected)
        torch.testing.assert_close(session.editor.solvers[layer].delta, delta, rtol=0, atol=1e-12)
    for name, value in ledger.adapter.model.named_parameters():
        assert name in ledger.names.values() or torch.equal(value, base[name]), name


# ---- undo ------------------------------------------------------------------------------------------------------------


@exact_modes
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("out", [[1], [4], [6], [2, 3, 5], [1, 2, 3, 4, 5, 6]], ids=str)
def test_undo_equals_a_stream_that_never_had_the_edits(mode: str, batch: int, out: list[int]) -> None:
    session = make(start(mode), batch=batch)
    before = dict(session.ledger.deltas)
    session.undo(out)
    assert holds(session) == [n for n in range(1, 7) if n not in out]
    kept = steps_without(out, batch)
    if kept:
        assert off(session, never(mode, kept)) < near(batch)
        assert off(session, before) > 1e-2  # the edits had been in
    else:
        assert max(float(delta.abs().max()) for delta in session.ledger.deltas.values()) < 1e-12
    weights_are_whole(session)


@exact_modes
def test_undo_in_single_precision(mode: str) -> None:
    """The statistics are float64 whatever the model is."""
    session = make(start(mode, F32))
    session.undo([2, 4])
    assert off(session, never(mode, steps_without([2, 4]), F32)) < 1e-8
    weights_are_whole(session)


@other_modes
@pytest.mark.parametrize(
    ("batch", "out"), [(1, [1]), (1, [2, 4]), (1, [6]), (3, [2]), (3, [3, 5]), (3, [6])], ids=str
)  # fmt: skip
def test_exact_undo_makes_the_later_edits_again(mode: str, batch: int, out: list[int]) -> None:
    """In a batch the other edits were found beside those that go: they are made again as well."""
    session = make(start(mode), batch=batch)
    session.undo(out, exact=True)
    assert off(session, never(mode, steps_without(out, batch))) < near(batch)
    assert holds(session) == [n for n in range(1, 7) if n not in out]
    weights_are_whole(session)


@other_modes
@pytest.mark.parametrize(("first", "second"), [([2], [5]), ([3], [1]), ([5, 1], [3, 4])], ids=str)
def test_exact_undo_after_an_exact_undo(mode: str, first: list[int], second: list[int]) -> None:
    """Edits that were made again stand in one record, but were solved one by one."""
    session = make(start(mode))
    session.undo(first, exact=True)
    session.undo(second, exact=True)
    assert off(session, never(mode, steps_without(first + second))) < 1e-8


def test_plain_undo_without_memory_takes_out_the_share_of_the_edit(tmp_path: Path) -> None:
    """MEMIT adds every block to the sum by itself; also those that an exact undo has made again."""
    session = make(start("memit", journal=tmp_path / "journal"))
    session.undo([2], exact=True)
    session.undo([5])
    recorded = session.ledger.journal.tensors(session.ledger.history.place(3)[0])
    solver = session.editor.solvers[1]
    prior = 5.0 * torch.eye(solver.d_in, dtype=F64)
    first = session.ledger.journal.tensors(session.ledger.history.place(1)[0])
    columns = [(first["keys.1"], first["residuals.1"])]
    for number in (3, 4, 6):
        column = session.ledger.history.place(number)[1]
        columns.append((recorded["keys.1"][:, [column]], recorded["residuals.1"][:, [column]]))
    expected = sum(r @ k.T @ torch.linalg.inv(prior + k @ k.T) for k, r in columns)
    torch.testing.assert_close(session.ledger.deltas[session.ledger.names[1]], expected, rtol=0, atol=1e-10)


@exact_modes
def test_exact_is_nothing_else_where_undo_is_exact(mode: str) -> None:
    one, other = (make(start(mode)) for _ in range(2))
    one.undo([2], exact=True)
    other.undo([2])
    assert differences(state_of(one), state_of(other)) == []
    assert one.ledger.journal.records[-1]["rewritten"] == []


@pytest.mark.parametrize("exact", [False, True])
def test_the_later_edits_are_made_again_only_on_demand(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(start("walked"))

    def never_again(*args: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(ClosedFormEditor, "_find", never_again)
    if exact:
        with pytest.raises(AssertionError, match="made again"):
            session.undo([3], exact=True)
        assert holds(session) == [1, 2, 3, 4, 5, 6]
    else:
        session.undo([3])


@pytest.mark.parametrize("mode", ["single", "base", "memit"])
def test_undo_inside_a_batch_leaves_the_others(mode: str) -> None:
    session = make(start(mode), batch=6)
    session.undo([2])
    session.undo([5, 6])
    assert holds(session) == [1, 3, 4]
    if mode == "memit":  # keys of the second layer were read with all six written into the first
        first = session.ledger.names[1]
        expected = never("memit", ((1, 3, 4),))
        assert_near(session.ledger.deltas[first], expected[first], near(6))
    else:
        assert off(session, never(mode, ((1, 3, 4),))) < near(6)


# ---- how far an undo can be off --------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("out", [[1], [2, 4], [6]], ids=str)
def test_deviation_says_how_far_off(mode: str, out: list[int]) -> None:
    session = make(start(mode))
    before = state_of(session)
    proposal = session.editor.retract(session.ledger.facts_of(out))
    estimate = session.editor.deviation(proposal)
    assert differences(state_of(session), before) == []  # looking changes nothing
    session.undo(out)
    true = off(session, never(mode, steps_without(out)))
    if mode in EXACT or out == [6]:
        assert estimate == 0.0
        assert true < 1e-8
    else:
        assert 0.02 < estimate < 2
        assert true / 4 < estimate < 4 * true


def test_deviation_of_an_edit_in_the_middle_of_a_batch() -> None:
    session = make(start("walked"), batch=6)
    proposal = session.editor.retract(session.ledger.facts_of([6]))
    assert session.editor.deviation(proposal) > 1e-3  # nothing is later, but five were solved with it
    session.undo([6])
    assert off(session, never("walked", ((1, 2, 3, 4, 5),))) > 1e-3


# ---- redo ------------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("batch", [1, 3])
def test_redo_brings_the_weights_back(mode: str, batch: int) -> None:
    session = make(start(mode), batch=batch)
    before = dict(session.ledger.deltas)
    known = session.editor.known.state_dict()
    session.undo([2, 3, 6])
    assert off(session, before) > 1e-2
    session.redo([6, 2])
    assert holds(session) == [1, 2, 4, 5, 6]
    session.redo([3])
    assert off(session, before) < 1e-10
    assert holds(session) == [1, 2, 3, 4, 5, 6]
    assert session.ledger.history.undone == {}
    weights_are_whole(session)
    again = session.editor.known.state_dict()
    rows = dict(zip(again["numbers"], again["sketches"], strict=True))
    for number, sketch in zip(known["numbers"], known["sketches"], strict=True):
        torch.testing.assert_close(rows[number], sketch)  # the right key for the right number


@exact_modes
def test_redo_after_more_edits(mode: str) -> None:
    session = make(start(mode), requests_of(1, 2, 3))
    session.undo([2])
    make(session, requests_of(4, 5))
    session.redo([2])
    assert off(session, never(mode, steps_without([6]))) < 1e-8
    assert holds(session) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("mode", ["walked", "memit"])
def test_redo_after_an_exact_undo_puts_the_same_fact_back(mode: str) -> None:
    """The later edits were made anew, so the model is another one; undo and redo still take each other back."""
    session = make(start(mode))
    session.undo([3], exact=True)
    without = dict(session.ledger.deltas)
    session.redo([3])
    assert off(session, without) > 1e-2
    session.undo([3])
    assert off(session, without) < 1e-10


# ---- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "numbers", "message"),
    [
        ("undo", [], "no edits were named"),
        ("redo", [], "no edits were named"),
        ("undo", [7], r"there is no edit 7; the edits of this ledger are 1 to 6"),
        ("redo", [7], r"there is no edit 7; the edits of this ledger are 1 to 6"),
        ("undo", [0], "there is no edit 0"),
        ("undo", [-1], "there is no edit -1"),
        ("undo", [1, 99], "there is no edit 99"),
        ("undo", [1, 2], r"edit 2 \('The mother tongue of Marie Curie is'\) is not in the model: because"),
        ("redo", [3], r"edit 3 \('Serena Williams plays the sport of'\) is in the model already"),
        ("redo", [2, 4], r"edit 4 .* is in the model already"),
    ],
)
def test_what_cannot_be_done_changes_nothing(action: str, numbers: list[int], message: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    session = make(start(journal=path))
    session.undo([2], "because")
    before, recorded = state_of(session), path.read_bytes()
    with pytest.raises(JournalError, match=message):
        getattr(session, action)(numbers)
    assert differences(state_of(session), before) == []
    assert path.read_bytes() == recorded


def test_twice_is_once_too_often() -> None:
    session = make(start())
    session.undo([2])
    with pytest.raises(JournalError, match="is not in the model: undone"):
        session.undo([2])
    session.redo([2])
    with pytest.raises(JournalError, match="is in the model already"):
        session.redo([2])
    with pytest.raises(JournalError, match="the edits of this ledger are none"):
        start().undo([1])


def test_an_edit_named_twice_is_taken_out_once() -> None:
    session = make(start())
    session.undo([2, 2, 2])
    assert off(session, never("single", steps_without([2]))) < 1e-8


def test_an_undo_is_one_record_that_says_who_and_why() -> None:
    session = make(start())
    count = len(session.ledger.journal)
    session.undo([4, 2], "too bold", origin="guard")
    session.redo([4])
    undo, redo = session.ledger.journal.records[count:]
    assert (undo["kind"], undo["removed"], undo["reason"], undo["origin"]) == ("undo", [2, 4], "too bold", "guard")
    assert (redo["kind"], redo["restored"], redo["origin"]) == ("redo", [4], "user")
    assert session.ledger.history.undone == {2: "too bold"}


def test_a_disk_that_is_full_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(start(journal=tmp_path / "journal"))
    before = state_of(session)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        for action in (lambda: session.undo([2]), lambda: session.undo([3], exact=True)):
            with pytest.raises(OSError, match="No space"):
                action()
        with pytest.raises(OSError, match="No space"):
            session.apply(session.editor.propose([replace(REQUESTS[0], id="new")]))
    assert differences(state_of(session), before) == []
    session.undo([2])
    assert off(session, never("single", steps_without([2]))) < 1e-8


def test_nothing_is_written_that_is_not_on_record_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a process dies of, the next one knows: the record is on disk before the first weight changes."""
    path = tmp_path / "journal"
    session = start(journal=path)
    append, seen = Journal.append, []

    def spy(journal: Journal, record: Any, tensors: Any = None) -> int:
        ledger = session.ledger
        clean = all(torch.equal(ledger.adapter.own_weight(n), w) for n, w in zip(ledger.layers, current, strict=True))
        index = append(journal, record, tensors)
        seen.append((record["kind"], clean, Journal(path, writable=False).records[index]["kind"]))
        return index

    monkeypatch.setattr(Journal, "append", spy)
    for action in (
        lambda: make(session, requests_of(1, 2), 2),
        lambda: session.undo([1]),
        lambda: session.redo([1]),
    ):
        current = [session.ledger.adapter.own_weight(layer).clone() for layer in session.ledger.layers]
        action()
        assert any(
            not torch.equal(session.ledger.adapter.own_weight(layer), weight)
            for layer, weight in zip(session.ledger.layers, current, strict=True)
        )
    assert seen == [(kind, True, kind) for kind in ("edit", "undo", "redo")]


# ---- doing again what is on record -----------------------------------------------------------------------------------


def story(session: EditSession, batch: int) -> None:
    """Edits, undo, more edits, undo of several, redo."""
    make(session, requests_of(1, 2, 3, 4), batch)
    session.undo([2])
    make(session, requests_of(5, 6), batch)
    session.undo([1, 5], exact=True)
    session.redo([2])


def forbid_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*args: object, **options: object) -> None:
        raise AssertionError("something was fitted")

    monkeypatch.setattr("lit_edit.editors.closed_form.located.optimise_targets", fit)
    monkeypatch.setattr(Walk, "facts", fit)


@every_mode
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_new_process_does_again_what_is_on_record(
    mode: str, batch: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    session = start(mode, dtype, path)
    story(session, batch)
    recorded = path.read_bytes()
    forbid_fitting(monkeypatch)
    again = start(mode, dtype, path)
    assert differences(state_of(again), state_of(session)) == []
    assert path.read_bytes() == recorded
    assert not again.ledger.ahead


@every_mode
def test_a_new_process_goes_on_from_any_record_and_any_checkpoint(mode: str, tmp_path: Path) -> None:
    """Saved after every record, and taken up with the whole journal: the end is the same, bit for bit."""
    path = tmp_path / "journal"
    stream = stream_of(mode, F32, path)
    session, saved = stream.open(), []
    for step in ((1, 2), (3,)):
        make(session, requests_of(*step), 2)
        saved.append(checkpoint_of(stream))
    session.undo([1])
    saved.append(checkpoint_of(stream))
    make(session, requests_of(4))
    session.redo([1])
    for state in saved:
        again = stream_of(mode, F32, path)
        resumed = again.open(state)
        assert differences(state_of(resumed), state_of(session)) == []


def checkpoint_of(stream: EditStream) -> dict[str, Any]:
    """What a checkpoint would hold, through a file as a checkpoint goes."""
    from tempfile import NamedTemporaryFile

    from lit_edit.files.trees import load_tree, save_tree

    saved = {
        "base_hash": stream.base_hash,
        "ledger": stream.ledger.state_dict(),
        "editor": stream.editor.state_dict(),
        "results": {},
        "perplexities": {},
        "seconds": {},
    }
    with NamedTemporaryFile(suffix=".ckpt") as file:
        save_tree(saved, file.name)
        return load_tree(file.name)


def test_a_journal_in_memory_travels_with_the_checkpoint() -> None:
    stream = stream_of("single")
    session = make(stream.open(), requests_of(1, 2, 3))
    saved = checkpoint_of(stream)
    again = stream_of("single")
    resumed = again.open(saved)
    resumed.undo([2])
    assert off(resumed, never("single", ((1,), (3,)))) < 1e-8
    assert holds(session) == [1, 2, 3]


def test_a_checkpoint_whose_journal_is_gone_is_refused(tmp_path: Path) -> None:
    stream = stream_of("single", journal=tmp_path / "journal")
    make(stream.open(), requests_of(1, 2))
    saved = checkpoint_of(stream)
    assert "journal" not in saved["ledger"]
    with pytest.raises(JournalError, match="the journal of these edits is missing"):
        stream_of("single", journal=tmp_path / "elsewhere").open(saved)


@pytest.mark.parametrize("other", ["another stream", "shorter"])
def test_a_checkpoint_of_another_journal_is_refused(other: str, tmp_path: Path) -> None:
    stream = stream_of("single", journal=tmp_path / "journal")
    make(stream.open(), requests_of(1, 2))
    saved = checkpoint_of(stream)
    path = tmp_path / "other"
    make(start("single", journal=path), requests_of(2, 1, 3) if other == "another stream" else requests_of(1))
    recorded = path.read_bytes()
    with pytest.raises(JournalError, match="does not belong to these edits"):
        stream_of("single", journal=path).open(saved)
    assert path.read_bytes() == recorded


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"covariance_weight": 6.0}, "covariance_weight 5.0, now 6.0"),
        ({"residual": "shared"}, "residual 'remeasured', now 'shared'"),
        ({"target": TargetSettings(steps=5, lr=0.1)}, "target.lr 0.5, now 0.1"),
        ({"contexts": [["{}"]]}, r"contexts \[\['\{\}'\], \['Well. \{\}'\]\], now \[\['\{\}'\]\]"),
        ({"layers": [2]}, r"layers \[1\], now \[2\]"),
    ],
    ids=["lambda", "residual", "target", "contexts", "layers"],
)
def test_other_settings_are_refused_by_name(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    make(start(journal=path), requests_of(1))
    recorded = path.read_bytes()
    with pytest.raises(ArgumentError, match=rf"made with other settings \(.*{told}"):
        start(journal=path, settings=settings)
    assert path.read_bytes() == recorded


def test_another_editor_and_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    make(start("walked", journal=path), requests_of(1))
    with pytest.raises(ArgumentError, match="editor 'D4S', now 'MEMIT'"):
        start("memit", journal=path)
    with pytest.raises(ArgumentError, match="other base weights"):
        start("walked", journal=path, model=tiny_model("llama", F64, seed=1))


@pytest.mark.parametrize("data", ["another edit", "another order"])
def test_a_stream_of_other_data_is_refused(data: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    make(start(journal=path), requests_of(1, 2))
    stream = stream_of("single", journal=path)
    stream.configure_model()
    stream._take_up()
    wrong = requests_of(2 if data == "another order" else 4)
    with pytest.raises(JournalError, match=r"the journal goes on with edit '0', the stream with '[13]': resume with"):
        stream.session.propose(wrong, wrong)
    assert len(stream.ledger) == 0


# ---- order and keys --------------------------------------------------------------------------------------------------


@exact_modes
def test_order_does_not_matter_where_keys_are_of_the_original(mode: str) -> None:
    expected = never(mode, steps_without([]))
    assert off(make(start(mode), requests_of(6, 3, 1, 5, 2, 4)), expected) < 1e-8
    assert off(make(start(mode), requests_of(2, 1, 6, 5, 4, 3), batch=4), expected) < near(4)


def test_order_matters_elsewhere() -> None:
    assert off(make(start("walked"), requests_of(6, 3, 1, 5, 2, 4)), never("walked", steps_without([]))) > 1e-3


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=0)


def test_the_index_finds_the_nearest_keys() -> None:
    keys = unit(600, 40)
    index = KeyIndex(600)
    index.add(list(range(1, 21)), keys[:, :20])
    index.add(list(range(21, 41)), 1e3 * keys[:, 20:].double())
    for number in (1, 20, 21, 40):
        near = 5 * keys[:, number - 1] + 0.02 * unit(600, seed=number)
        found = index.nearest(near, 3)
        assert found[0][0] == number
        assert found[0][1] > 0.998
        assert [cosine for _, cosine in found] == sorted((c for _, c in found), reverse=True)
        assert found[1][1] < 0.6
    index.remove([21, 3])
    assert 21 not in [number for number, _ in index.nearest(keys[:, 20], 40)]
    assert index.nearest(keys[:, 39])[0][0] == 40
    assert len(index.nearest(keys[:, 0], 100)) == 38


def test_the_index_after_a_restart() -> None:
    index, again = KeyIndex(50), KeyIndex(50)
    index.add([4, 2], unit(50, 2))
    again.load_state_dict(index.state_dict())
    index.add([7], unit(50, 1, seed=9))
    assert again.nearest(unit(50, 2)[:, 1])[0][0] == 2
    assert again.numbers == [4, 2]
    assert KeyIndex(50).nearest(unit(50)) == []


@every_mode
def test_edits_that_do_not_hold_have_no_key(mode: str) -> None:
    session = make(start(mode), requests_of(1, 2, 3))
    twin = replace(REQUESTS[1], id="twin")

    def nearest() -> tuple[int, float]:
        ((best, *_),) = session.editor.similar([twin], [twin])
        return best

    assert nearest()[0] == 2
    assert nearest()[1] > 0.9999
    session.undo([2])
    assert nearest()[1] < 0.999
    assert sorted(session.editor.known.numbers) == [1, 3]
    session.redo([2])
    assert nearest()[0] == 2


# ---- conflicts -------------------------------------------------------------------------------------------------------

ROME = EditRequest("a", "The capital of {} is", "Italy", "Vienna")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize(
    "second",
    [
        replace(ROME, id="b", target_new="Berlin"),
        replace(ROME, id="b", target_new="Berlin", prompt="the  capital of {} IS "),
        replace(ROME, id="b", target_new="Berlin", subject="ITALY"),
        replace(ROME, id="b", target_new="Berlin", prompt="The capital of {} was"),  # one and the same key
    ],
    ids=["same", "case and space", "subject's case", "wording behind the subject"],
)
@every_mode
def test_the_second_answer_replaces_the_first(
    mode: str, second: EditRequest, told: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    session = make(start(mode), [ROME, REQUESTS[1]])
    count = len(session.ledger.journal)
    make(session, [second])
    (record,) = session.ledger.journal.records[count:]  # one record: both, or nothing
    assert (record["kind"], record["removed"], [e["id"] for e in record["entries"]]) == ("edit", [1], ["b"])
    reason = session.ledger.history.undone[1]
    assert reason == record["reason"]
    assert reason.startswith("replaced by 'b' (")
    assert "the same fact" in reason
    assert "edit 1 ('The capital of Italy is' -> 'Vienna') is replaced by 'b'" in told.text
    assert [entry.id for entry in session.ledger.entries] == ["1", "b"]
    weights_are_whole(session)
    if mode in EXACT:
        alone = make(start(mode), [REQUESTS[1], second])
        assert off(session, dict(alone.ledger.deltas)) < 1e-8


def test_a_replacement_that_fails_leaves_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(start(), [ROME])
    before = state_of(session)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    second = [replace(ROME, id="b", target_new="Berlin")]
    with pytest.raises(OSError, match="No space"):
        session.apply(session.propose(second, second))
    assert differences(state_of(session), before) == []


def test_a_replacement_is_done_again_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    session = make(start("walked", F32, path), [ROME, REQUESTS[1], replace(ROME, id="b", target_new="Berlin")])
    forbid_fitting(monkeypatch)
    assert differences(state_of(start("walked", F32, path)), state_of(session)) == []


def test_a_replaced_edit_can_be_put_back_but_not_beside_the_second() -> None:
    session = make(start(), [ROME, replace(ROME, id="b", target_new="Berlin")])
    with pytest.raises(JournalError, match=r"edit 1 .* is of the same fact as edit 2, which holds: take that out"):
        session.redo([1])
    assert holds(session) == [2]
    session.undo([2])
    assert max(float(delta.abs().max()) for delta in session.ledger.deltas.values()) < 1e-12
    session.redo([1])
    assert off(session, dict(make(start(), [ROME]).ledger.deltas)) < 1e-8
    with pytest.raises(JournalError, match=r"edit 2 .* is of the same fact as edit 1"):
        session.redo([2])
    assert holds(session) == [1]


def test_averaging_keeps_both(told: pytest.LogCaptureFixture) -> None:
    second = replace(ROME, id="b", target_new="Berlin")
    session = make(start(on_conflict="average"), [ROME, second])
    assert holds(session) == [1, 2]
    assert "replaced" not in told.text
    one = make(start(), [ROME])
    other = make(start(), [second])
    (name,) = session.ledger.names.values()
    key = session.ledger.journal.tensors(1)["keys.1"]
    said = [s.ledger.deltas[name] @ key for s in (one, other, session)]
    middle = (said[0] + said[1]) / 2
    assert float((said[2] - middle).norm()) < 0.35 * float((said[0] - said[1]).norm())


@pytest.mark.parametrize("where", ["one step", "a later step"])
def test_refusing_keeps_the_first(where: str, told: pytest.LogCaptureFixture) -> None:
    second = replace(ROME, id="b", target_new="Berlin", prompt="the capital  of {} is")
    session = start(on_conflict="refuse")
    make(session, [ROME, second, REQUESTS[1]], batch=3 if where == "one step" else 1)
    assert [entry.id for entry in session.ledger.entries] == ["a", "1"]
    ((name, reason),) = session.ledger.history.refused
    assert name == "b"
    assert "the same fact" in reason or "is of the same fact" in reason
    assert "not made: edit 'b'" in told.text
    assert off(session, dict(make(start(), [ROME, REQUESTS[1]]).ledger.deltas)) < near(3)
    assert set(session.ledger.history.handled) == {"a", "b", "1"}


def test_in_one_step_the_last_answer_counts() -> None:
    second = replace(ROME, id="b", target_new="Berlin", prompt="the capital  of {} is")
    session = make(start(), [ROME, REQUESTS[1], second], batch=3)
    assert [entry.id for entry in session.ledger.entries] == ["1", "b"]
    ((name, reason),) = session.ledger.history.refused
    assert name == "a"
    assert "edit 'b' of the same step is of the same fact" in reason


def test_one_step_may_replace_several() -> None:
    session = make(start(), [ROME, REQUESTS[1], REQUESTS[2]])
    again = [replace(r, id=f"{r.id}!", target_new="chess") for r in (ROME, REQUESTS[1])]
    make(session, again, batch=2)
    assert session.ledger.journal.records[-1]["removed"] == [1, 2]
    assert [entry.id for entry in session.ledger.entries] == ["2", "a!", "1!"]
    assert session.ledger.history.undone[1].count("replaced by ") == 2  # one record, one reason


def test_where_the_subject_opens_the_prompt_there_is_only_a_warning(told: pytest.LogCaptureFixture) -> None:
    """ "Ada lives in" and "Ada works for" have one key, and are two facts."""
    one = EditRequest("a", "{} lives in", "Ada", "Rome")
    other = EditRequest("b", "{} works for", "Ada", "IBM")
    for policy in ("replace", "refuse"):
        told.clear()
        session = make(start(on_conflict=policy), [one, other])
        assert holds(session) == [1, 2]
        assert session.ledger.history.refused == []
        assert "have one and the same key, because the subject opens the prompt" in told.text


@pytest.mark.parametrize("policy", ["replace", "refuse"])
def test_other_facts_are_no_conflicts(policy: str, told: pytest.LogCaptureFixture) -> None:
    session = make(start(on_conflict=policy))
    assert holds(session) == [1, 2, 3, 4, 5, 6]
    assert told.text == ""


def test_an_edit_that_was_taken_out_is_no_conflict() -> None:
    session = make(start(), [ROME])
    session.undo([1])
    make(session, [replace(ROME, id="b", target_new="Berlin")])
    assert session.ledger.journal.records[-1]["removed"] == []
    assert session.ledger.history.undone == {1: "undone"}


@pytest.mark.parametrize("policy", ["replace", "refuse"])
def test_a_key_of_no_number_is_like_no_other(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with NaN must not turn into a conflict with whatever was edited before."""
    session = make(start(on_conflict=policy), requests_of(1, 2))
    monkeypatch.setattr(Walk, "first_keys", lambda self, rows: torch.full((48, 1), torch.nan))
    make(session, requests_of(4))
    assert holds(session) == [1, 2, 3]
    assert session.ledger.history.refused == []


# ---- edits that must not be written ----------------------------------------------------------------------------------

BAD = REQUESTS[2]  # number 3


def nan_key(patch: pytest.MonkeyPatch) -> None:
    find, mean_key = ClosedFormEditor._find, Walk._mean_key

    def poisoned(self: Any, rows: Any, names: Sequence[str], *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if any(name.startswith(f"{BAD.id}\x1f") for name in names):
                inner.setattr(Walk, "_mean_key", lambda *a: mean_key(*a) * torch.nan)
            return find(self, rows, names, *args)

    patch.setattr(ClosedFormEditor, "_find", poisoned)


def nan_embedding(patch: pytest.MonkeyPatch) -> None:
    """A token whose embedding is broken: whoever reads it has no numbers left."""


def infinite_update(patch: pytest.MonkeyPatch) -> None:
    propose = ClosedFormEditor.propose

    def poisoned(self: Any, requests: Sequence[EditRequest], *args: Any) -> Any:
        proposal = propose(self, requests, *args)
        if all(request.id != BAD.id for request in requests):
            return proposal
        (first, *rest) = proposal.updates
        return replace(proposal, updates=(LayerUpdate(first.layer, first.name, first.delta / 0.0), *rest))

    patch.setattr(ClosedFormEditor, "propose", poisoned)


HARMS = {"a key of no number": nan_key, "a target that diverges": nan_embedding, "no finite weight": infinite_update}
REASONS = {
    "a key of no number": "keys hold NaN or infinite values",
    "a target that diverges": r"the target of edit '2' \('Serena Williams plays the sport of' -> .* diverged at step 0",
    "no finite weight": r"edit '.*2.*' would write NaN or infinite values into model.layers.1",
}
every_harm = pytest.mark.parametrize("harm", HARMS)


def harmful_stream(harm: str, patch: pytest.MonkeyPatch, **options: Any) -> tuple[EditStream, list[EditRequest]]:
    """A stream whose third edit must not be written."""
    HARMS[harm](patch)
    requests = list(REQUESTS)
    model = tiny_model("llama", options.pop("dtype", F64))
    if harm == "a target that diverges":
        with torch.no_grad():  # of a token that no other edit has
            model.get_input_embeddings().weight[tiny_tokenizer()("Serena Williams")["input_ids"][-1]] = torch.nan
    return stream_of("walked", model=model, **options), requests


@every_harm
def test_harm_stops_the_run(harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, requests = harmful_stream(harm, monkeypatch)
    session = make(stream.open(), requests[:2])
    before, records = state_of(session), len(session.ledger.journal)
    with pytest.raises((EditRefusedError, FloatingPointError), match=REASONS[harm]):
        make(session, requests[2:])
    assert differences(state_of(session), before) == []
    assert len(session.ledger.journal) == records
    for name, value in session.ledger.adapter.model.named_parameters():
        assert name == "model.embed_tokens.weight" or torch.isfinite(value).all()


@every_harm
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_harm_is_skipped(harm: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    with monkeypatch.context() as patch:
        stream, requests = harmful_stream(harm, patch, on_refused="skip", journal=path)
        session = make(stream.open(), requests, batch)
    assert [entry.id for entry in session.ledger.entries] == ["0", "1", "3", "4", "5"]
    ((name, reason),) = session.ledger.history.refused
    assert name == "2"
    assert re.search(REASONS[harm], reason)
    kinds = [record["kind"] for record in session.ledger.journal.records]
    assert kinds.count("refused") == 1
    if harm != "a target that diverges":  # whose model is another one
        assert off(session, never("walked", steps_without([3], batch))) < near(batch)

    recorded = path.read_bytes()
    with monkeypatch.context() as patch:  # a new process repeats it, and does not try the third again
        stream, requests = harmful_stream(harm, patch, on_refused="skip", journal=path)
        forbid_fitting(patch)
        stream.configure_model()
        stream._take_up()
        again = make(stream.session, requests, batch)
    assert differences(state_of(again), state_of(session)) == []
    assert path.read_bytes() == recorded


@every_harm
def test_the_rest_of_a_window_is_made(harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are fitted for a whole window: one that diverges must not take the others with it."""
    with monkeypatch.context() as patch:
        stream, requests = harmful_stream(harm, patch, on_refused="skip")
        session = stream.open()
        for request in requests:
            if (proposal := session.propose([request], requests)) is not None:
                session.apply(proposal)
    assert [entry.id for entry in session.ledger.entries] == ["0", "1", "3", "4", "5"]
    assert [name for name, _ in session.ledger.history.refused] == ["2"]


def test_edits_that_do_only_together_harm_are_all_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    propose = ClosedFormEditor.propose

    def poisoned(self: Any, requests: Sequence[EditRequest], *args: Any) -> Any:
        if len(requests) > 1:
            raise FloatingPointError("too many at once")
        return propose(self, requests, *args)

    monkeypatch.setattr(ClosedFormEditor, "propose", poisoned)
    session = make(start(on_refused="skip"), requests_of(1, 2, 3), batch=3)
    assert len(session.ledger) == 0
    assert dict(session.ledger.history.refused) == dict.fromkeys("012", "too many at once")
    make(session, requests_of(4))
    assert holds(session) == [1]


def test_every_target_may_diverge(told: pytest.LogCaptureFixture) -> None:
    settings = {"target": TargetSettings(steps=5, lr=3e37)}
    session = make(start("walked", F32, on_refused="skip", settings=settings), requests_of(1, 2), batch=2)
    assert len(session.ledger) == 0
    assert [name for name, _ in session.ledger.history.refused] == ["0", "1"]
    assert "Use a smaller learning rate (model.editor.init_args.target.lr, now 3e+37)" in told.text
    weights = session.ledger.adapter.model.state_dict()
    assert [n for n, v in tiny_model("llama", F32).state_dict().items() if not torch.equal(v, weights[n])] == []


def test_errors_of_a_program_are_not_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped must be what an edit is to blame for."""
    session = start(on_refused="skip")

    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lit_edit.editors.closed_form.located.optimise_targets", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        make(session, requests_of(1))
    assert session.ledger.history.refused == []


@every_harm
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_that_skips_goes_on_to_the_end(
    harm: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, requests = harmful_stream(harm, monkeypatch, on_refused="skip", dtype=F32)
    data = EditDataModule.from_requests(requests, target_window=4, batch_size=batch)
    data.perplexity_texts = ["A plain sentence of some words."]
    trainer = make_trainer(tmp_path)
    trainer.fit(stream, data)
    assert trainer.global_step == {1: 5, 2: 3}[batch]
    assert stream.is_at_end
    summary = stream.finish()
    assert (summary["edits"], summary["refused"]) == (5, 1)
    assert set(stream.results["immediate"]) == set("01345")
    assert stream.ledger.history.handled == ["0", "1", "2", "3", "4", "5"]


def test_a_stream_cut_between_a_refusal_and_the_rest_of_its_step_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says that the second edit of a step was refused, and nothing yet about the first."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(folder: Path, **fit: Any) -> EditStream:
        stream, requests = harmful_stream(
            "no finite weight", monkeypatch, on_refused="skip", journal=folder / "journal"
        )
        requests[2], requests[3] = requests[3], requests[2]  # the harmful one is the second of its step
        data = EditDataModule.from_requests(requests, batch_size=2)
        data.perplexity_texts = ["A plain sentence of some words."]
        saver = ModelCheckpoint(folder / "saved", every_n_train_steps=100, save_on_exception=True, save_last=True)
        make_trainer(folder, [saver]).fit(stream, data, **fit)
        return stream

    whole = run(tmp_path / "whole")
    refuse = EditSession.refuse

    def cut(session: EditSession, *args: Any) -> None:
        refuse(session, *args)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "refuse", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut")
    recorded = Journal(tmp_path / "cut" / "journal", writable=False).records
    assert [record["kind"] for record in recorded] == ["begin", "edit", "refused"]
    for checkpoint in (str(tmp_path / "cut" / "saved" / "last.ckpt"), None):
        resumed = run(tmp_path / "cut", ckpt_path=checkpoint)
        assert [e.id for e in resumed.ledger.entries] == [e.id for e in whole.ledger.entries]
        assert differences(state_of(resumed.session), state_of(whole.session)) == []


def test_the_state_of_the_weights_is_told_by_the_records_that_write_them(tmp_path: Path) -> None:
    session = make(start(journal=tmp_path / "journal"), requests_of(1, 2))
    first = weights_state(session.ledger.journal)
    session.refuse(requests_of(3), "for fun")
    session.ledger.note({"kind": "end"})
    assert weights_state(session.ledger.journal) == first
    session.undo([1])
    undone = weights_state(session.ledger.journal)
    session.redo([1])
    assert len({first, undone, weights_state(session.ledger.journal)}) == 3
