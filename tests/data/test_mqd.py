"""MQD: the events, the three kinds of questions about them, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_edit.cli.main import main
from lit_edit.data.events import Event, read_events
from lit_edit.data.mqd import KINDS, LETTERS, WORDINGS, build_mqd
from lit_edit.data.request import DataError, EditRequest
from lit_edit.data.sources import load_requests
from lit_edit.errors import ArgumentError

EVENTS = read_events()
MADE = build_mqd(EVENTS)
RIGHT: dict[tuple[str, str], set[str]] = {}
OF_HEAD: dict[str, set[str]] = {}
GROUPS = {(event.relation, event.tail): event.group for event in EVENTS}
for event in EVENTS:
    RIGHT.setdefault((event.head, event.relation), set()).add(event.tail)
    OF_HEAD.setdefault(event.head, set()).add(event.tail)


def options_of(prompt: str) -> dict[str, str]:
    lines = [line.partition(". ") for line in prompt.split("\n")[1:-1]]
    return {letter: tail for letter, _, tail in lines}


def is_right(request: EditRequest, kind: str, head: str, prompt: str, answer: str) -> bool:
    """Answer a question from the events alone."""
    right = RIGHT[head, request.relation]
    if kind == "direct":
        return answer in right
    if kind == "choice":
        return [letter for letter, tail in options_of(prompt).items() if tail in right] == [answer]
    statement = prompt.partition(".\nIs this True or False? It is")[0]
    return answer == str(any(statement.endswith(f" {tail}") for tail in right))


# ---- the events that ship -----------------------------------------------------------------------------------------


def test_the_events_that_ship_are_many_and_of_every_relation() -> None:
    assert len(EVENTS) == len(set(EVENTS)) >= 120
    counts = Counter(event.relation for event in EVENTS)
    assert set(counts) == set(WORDINGS)
    assert min(counts.values()) >= 12
    assert len({event.head for event in EVENTS}) >= 60
    assert all(event.group and event.head.startswith("PersonX ") for event in EVENTS)


# ---- the data set -------------------------------------------------------------------------------------------------


def test_the_three_kinds_ask_about_the_same_in_the_same_order() -> None:
    direct, choice, truth = ([(r.subject, r.relation) for r in MADE[kind]] for kind in KINDS)
    assert direct == choice == truth
    assert len(direct) == len(set(direct)) >= 80
    for kind in KINDS:
        assert [r.id for r in MADE[kind]][:2] == [f"mqd-0001-{kind}", f"mqd-0002-{kind}"]
    for requests in zip(*MADE.values(), strict=True):
        assert len({request.text[: request.subject_span[1]] for request in requests}) == 1  # one key for an editor
        assert len({request.prompt for request in requests}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    for request in MADE[kind]:
        head = request.subject
        assert is_right(request, kind, head, request.text, request.target_new), request
        assert request.target_true is not None
        assert not is_right(request, kind, head, request.text, request.target_true), request
        [paraphrase] = request.paraphrases
        assert paraphrase != request.text
        assert head in paraphrase
        assert is_right(request, kind, head, paraphrase, request.target_new), request


def test_wrong_answers_are_no_right_ones_and_differ() -> None:
    for request in MADE["choice"]:
        options = options_of(request.text)
        assert list(options) == list(LETTERS)
        assert len(set(options.values())) == 4
        right = options.pop(request.target_new)
        for wrong in options.values():
            assert wrong not in OF_HEAD[request.subject]
            assert (request.relation, wrong) in GROUPS  # a tail of the relation, of another head
            assert GROUPS[request.relation, wrong] != GROUPS[request.relation, right]


def test_letters_and_truth_values_are_in_balance_in_short_streams_too() -> None:
    assert Counter(r.target_new for r in MADE["choice"][:20]) == dict.fromkeys("ABCD", 5)
    assert Counter(r.target_new for r in MADE["truth"][:20]) == {"True": 10, "False": 10}
    assert len({r.subject for r in MADE["direct"][:40]}) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_never_edited_and_have_right_answers_of_their_own(kind: str) -> None:
    edited = {request.subject for request in MADE["direct"]}
    heads = {event.head for event in EVENTS} - edited
    by_text = {}
    for head in heads:
        for relation in WORDINGS:
            by_text |= {WORDINGS[relation][0].direct.replace("{}", head): (head, relation)}
            by_text |= {WORDINGS[relation][0].question.replace("{}", head): (head, relation)}
    for request in MADE[kind]:
        assert len({probe.prompt for probe in request.neighborhood}) == 3
        for probe in request.neighborhood:
            assert probe.answer != request.target_new
            head, relation = next(place for text, place in by_text.items() if probe.prompt.startswith(text))
            own = EditRequest("", "{}", head, "x", relation=relation)
            assert is_right(own, kind, head, probe.prompt, probe.answer), probe


def test_it_is_the_same_again_and_another_with_another_seed() -> None:
    assert build_mqd(EVENTS) == MADE
    assert build_mqd(EVENTS, seed=1) != MADE
    short = build_mqd(EVENTS, count=7)
    assert short == {kind: requests[:7] for kind, requests in MADE.items()}


def test_known_by_heart() -> None:
    """A small set, by hand: the wrong answers are all that there can be."""
    events = [Event(f"PersonX does {n}", "xReact", tail) for n, tail in enumerate(["calm", "sad", "proud", "tired"])]
    events.append(Event("PersonX does 0", "xReact", "very calm"))
    made = build_mqd(events)
    assert [len(requests) for requests in made.values()] == [3, 3, 3]
    for direct, choice, truth in zip(*made.values(), strict=True):
        assert direct.text == f"When {direct.subject}, PersonX feels"
        options = sorted(tail.removeprefix("very ") for tail in options_of(choice.text).values())
        assert options == ["calm", "proud", "sad", "tired"]  # not both of the first head's
        said = direct.target_new if truth.target_new == "True" else direct.target_true
        assert truth.text == f"When {direct.subject}, PersonX feels {said}.\nIs this True or False? It is"


def test_too_few_tails_are_named() -> None:
    events = [Event(f"PersonX does {n}", "xReact", tail) for n, tail in enumerate(["calm", "sad", "proud"])]
    with pytest.raises(DataError, match=r"xReact: 3 wrong answers are needed, the events have 2 "):
        build_mqd(events)
    same = [Event(e.head, e.relation, f"tail {n}", "mood") for n, e in enumerate(events * 3)]
    with pytest.raises(DataError, match="and groups"):
        build_mqd(same)
    with pytest.raises(ArgumentError, match=f"count must be at most {len(MADE['direct'])}, got 1000"):
        build_mqd(EVENTS, count=1000)


# ---- reading events -----------------------------------------------------------------------------------------------


def test_files_in_the_form_of_atomic_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.tsv"
    rows = [
        "head\trelation\ttail",
        "PersonX  runs .\txNeed\tto have shoes.",
        "PersonX runs\txNeed\tnone",
        "PersonX eats ___\txNeed\tto cook",
        "PersonX runs\tisAfter\tPersonX walks",
        "PersonX runs\txNeed\tto have shoes",
        "",
    ]
    path.write_text("\r\n".join(rows))
    assert read_events(str(path)) == [Event("PersonX runs", "xNeed", "to have shoes")]
    assert "1 without a tail, 1 with a blank in the head, 1 of other relations" in caplog.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PersonX runs to school", "expected head, relation and tail .* got 1 columns"),
        ("a\tb\tc\td\te", "got 5 columns"),
        ("PersonX runs\txNeeds\tto rest", "unknown relation 'xNeeds'; did you mean xNeed"),
        ("PersonX runs\t\tto rest", "the relation is empty"),
        ("PersonX {} runs\txNeed\tto rest", "the head holds {}"),
    ],
)
def test_broken_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "events.tsv"
    path.write_text(f"# mine\nPersonX runs\txNeed\tto have shoes\n{line}\n")
    with pytest.raises(DataError, match=said) as raised:
        read_events(str(path))
    assert str(raised.value).startswith(f"{path}:3: ")


def test_files_without_events_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.tsv"
    with pytest.raises(DataError, match="no such file"):
        read_events(str(path))
    path.write_text("PersonX runs\txNeed\tnone\n")
    with pytest.raises(DataError, match="no events; left out were tuples that say nothing: 1 without a tail"):
        read_events(str(path))


def test_hub_data_sets_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [{"head": "PersonX runs", "relation": "xNeed", "tail": "to have shoes", "other": 1}]
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: asked.append((name, split)) or rows)
    assert read_events("owner/atomic", "test") == [Event("PersonX runs", "xNeed", "to have shoes")]
    assert asked == [("owner/atomic", "test")]
    rows.append({"event": "x"})
    with pytest.raises(DataError, match=r"owner/atomic, row 1: expected a text in the column head; .* columns event"):
        read_events("owner/atomic")


def test_hub_data_sets_that_cannot_be_loaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(DataError, match=r"hub data set 'owner/atomic' .* cannot be loaded: no network"):
        read_events("owner/atomic")


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_files_that_the_reader_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "mqd", "--count", "12", "--out", str(tmp_path / "mqd")]) == 0
    out = capsys.readouterr().out
    for kind in KINDS:
        path = tmp_path / "mqd" / f"mqd_{kind}.json"
        for source in ("file", "facts"):
            assert load_requests(source, str(path)) == (MADE[kind][:12], [])  # type: ignore[arg-type]
        assert f"{path}: 12 requests, the first:\n    {MADE[kind][0].text.split(chr(10))[0]}" in out
        assert len(json.loads(path.read_text())) == 12
    assert sorted(path.name for path in (tmp_path / "mqd").iterdir()) == sorted(f"mqd_{kind}.json" for kind in KINDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build"], "name a data set: mqd"),
        (["build", "mqt"], "there is no data set 'mqt'; did you mean mqd?"),
        (["build", "mqd", "--out", "x", "--events", "gone.tsv"], "gone.tsv: no such file"),
        (["build", "mqd", "--out", "x", "--count", "5000"], "count must be at most"),
    ],
)
def test_errors_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--help"]) == 0
    assert "mqd  one set of questions in three kinds" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["build", "mqd", "--help"])
    assert stop.value.code == 0
    assert "the Multi-Question Dataset" in capsys.readouterr().out
