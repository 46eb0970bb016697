"""Which edits hold, and the reasons why others do not."""

from __future__ import annotations

from typing import Any

import pytest

from lit_edit.runs.holding import FAILED, Verdict, closing_lines, counts, explain, failures, headline, judge, to_tell

Row = dict[str, Any]


def row(number: int, prompt: str = "The capital of Italy is", subject: str = "Italy", **marks: Any) -> Row:
    """An edit as in ``ledger/edits.jsonl``, of an editor that writes to the subject's key."""
    about = {"id": f"id{number}", "prompt": prompt, "subject": subject, "target_new": f"object {number}"}
    made = {"target_probability": 0.97, "residual_norm": 1.0, "immediate_accuracy": True, "final_accuracy": False}
    return {"number": number, "status": "holds", **about, **made, **marks}


def record(*rows: Row, kind: str = "edit", **more: Any) -> Row:
    """A record of the journal that makes some edits."""
    entries = [{name: one[name] for name in ("number", "id", "prompt", "subject", "target_new")} for one in rows]
    return {"kind": kind, "entries": entries, "removed": [], **more}


def answer(number: int, said: str = " Rome", lookup: int = 3) -> Row:
    final = {"choice": said, "hit": False}
    return {"number": number, "lookup": lookup, "prompts": [{"kind": "efficacy", "prompt": "", "final": final}]}


def verdict(one: Row, *others: Row, answers: Any = (), records: Any = ()) -> Verdict:
    found = judge([one, *others], answers, records)
    return found[0]


def test_what_holds_holds_by_its_last_mark() -> None:
    found = verdict(row(1, immediate_accuracy=False, final_accuracy=True))
    assert (found.state, found.said, found.reasons, found.failed) == ("holds", "object 1", (), False)
    assert found.as_dict()["holds"] is True


def test_what_was_not_measured_is_not_said_to_hold() -> None:
    edit = row(1)
    del edit["final_accuracy"]
    found = verdict(edit)
    assert (found.state, found.failed, found.as_dict()["holds"]) == ("not measured", False, None)


@pytest.mark.parametrize(("took", "state"), [(True, "forgotten"), (False, "never took"), (None, "fails")])
def test_what_does_not_hold_is_told_apart_by_the_moment_of_the_edit(took: bool | None, state: str) -> None:
    edit = row(1, immediate_accuracy=took)
    found = verdict(edit, answers=[answer(1)])
    assert (found.state, found.said, found.failed) == (state, " Rome", True)
    assert verdict({n: v for n, v in edit.items() if n != "immediate_accuracy"}).state == "fails"  # nobody looked


def test_forgotten_by_which_edit() -> None:
    found = verdict(row(1, immediate_target_nll=0.0726, missed_since=40))
    assert found.reasons == (
        "it held right after it was made (p 0.93), and no longer when it was measured after edit 40",
    )
    assert verdict(row(1)).reasons == ("it held right after it was made",)


def test_a_shared_key_is_one_of_the_same_words_up_to_the_subjects_end() -> None:
    lives, works = row(2, "Ana Quill lives in", "Ana Quill"), row(3, "Ana Quill works for", "Ana Quill")
    other, same = row(4, "Ana Quiller is", "Ana Quiller"), row(5, "Ana Quill lives in", "Ana Quill")
    same["target_new"] = lives["target_new"]  # takes nothing from it
    far = row(6, "The home of Ana Quill is", "ana quill")
    found = verdict(lives, works, other, same, far)
    assert found.reasons[1:] == (
        "it shares its key with edit 3: the prompts are the same up to the subject's end",
        "it shares its subject with edit 6",
    )
    gone = {**works, "status": "undone"}
    assert verdict(lives, gone).reasons[1:] == ()


def test_many_rivals_are_counted() -> None:
    rows = [row(n, f"The {'capital' if n < 2 else n} of Italy is") for n in range(1, 7)]
    assert verdict(*rows).reasons[1] == "it shares its subject with edits 2, 3, 4 and 2 more"
    assert verdict(*rows[:3]).reasons[1] == "it shares its subject with edits 2 and 3"


def test_the_subjects_place_is_that_of_the_request() -> None:
    """Where the subject stands twice the request says which one was edited."""
    one, other = row(1, "Ada is where Ada lives:", "Ada"), row(2, "Ada is not here", "Ada")
    first, second = record(one), record(other)
    first["entries"][0]["request"] = {"prompt": "{} is where Ada lives:"}
    assert "shares its key with edit 2" in verdict(one, other, records=[first, second]).reasons[1]
    assert "shares its subject with edit 2" in verdict(one, other, records=[record(one), second]).reasons[1]


def test_editors_that_write_to_no_key_share_subjects_only() -> None:
    lives, works = row(2, "Ana lives in", "Ana"), row(3, "Ana works for", "Ana")
    for one in (lives, works):
        del one["residual_norm"]
    found = verdict(lives, works, answers=[answer(2, lookup=0)])
    assert found.reasons[1:] == ("it shares its subject with edit 3",)


def test_a_subject_with_no_token_before_it() -> None:
    edit = row(1, "Google was founded in", "Google", immediate_accuracy=False)
    assert verdict(edit, answers=[answer(1, lookup=0)]).reasons == (
        "its subject is the first token of the prompt: no token stands before it",
    )
    assert "first token" not in str(verdict(edit, answers=[answer(1, lookup=1)]).reasons)
    old = {name: value for name, value in answer(1).items() if name != "lookup"}  # of an earlier release
    assert "first token" not in str(verdict(edit, answers=[old]).reasons)


BEGIN = {"kind": "begin", "settings": {"target.probability": 0.95}}


@pytest.mark.parametrize(
    ("reached", "records", "reasons"),
    [
        (0.41, [BEGIN], ("its target reached only p 0.41 of the 0.95 asked for when it was fitted",)),
        (0.91, [BEGIN], ("its target reached only p 0.91 of the 0.95 asked for when it was fitted",)),
        (0.41, [], ("its target reached only p 0.41 when it was fitted",)),
        (
            0.41,
            [{"kind": "begin", "settings": {"target.probability": 0.0}}],
            ("its target reached only p 0.41 when it was fitted",),
        ),
        (0.97, [BEGIN], ("its target was found (p 0.97), but writing it did not make it the first choice",)),
        (0.91, [], ("its target was found (p 0.91), but writing it did not make it the first choice",)),
        (None, [], ("writing it did not make it the first choice",)),
    ],
)
def test_what_the_target_reached(reached: float | None, records: Any, reasons: tuple[str, ...]) -> None:
    edit = row(1, immediate_accuracy=False, target_probability=reached)
    assert verdict(edit, records=records).reasons == reasons


def test_the_likeliest_reason_comes_first() -> None:
    rows = [row(n, f"Ana {n}", "Ana", immediate_accuracy=False, target_probability=p) for n, p in ((1, 0.1), (2, 0.9))]
    low, high = judge(rows, [], [BEGIN])
    assert [reason[:19] for reason in low.reasons] == ["its target reached ", "it shares its key w"]
    assert [reason[:19] for reason in high.reasons] == ["it shares its key w", "its target reached "]


def test_replaced_by_which_edit() -> None:
    old, new, beside = row(1, status="replaced by 'id2', the same fact"), row(2), row(3, "Peru is", "Peru")
    records = [record(old), record(new, beside, removed=[1])]  # a step of two edits
    found = judge([old, new, beside], [answer(1)], records)[0]
    assert (found.state, found.said) == ("replaced", None)
    assert found.reasons == ("by edit 2 (The capital of Italy is → object 2)",)


def test_undone_by_hand_and_by_a_guard() -> None:
    rows = [row(1, status="undone"), row(2, status="taken back: perplexity is 9 times"), row(3)]
    undo = [{"kind": "undo", "entries": [], "removed": [number]} for number in (1, 2)]
    by_hand, by_guard, _ = judge(rows, [], [record(*rows), *undo])
    assert (by_hand.state, by_hand.reasons) == ("undone", ())
    assert (by_guard.state, by_guard.reasons) == ("undone", ("taken back: perplexity is 9 times",))


def test_replaced_put_back_and_undone_is_undone() -> None:
    old, new = row(1, status="undone"), row(2, status="undone")
    records = [
        record(old),
        record(new, removed=[1]),
        {"kind": "undo", "removed": [2]},
        {"kind": "undo", "removed": [1]},
    ]
    assert [v.state for v in judge([old, new], [], records)] == ["undone", "undone"]


def test_refused_with_and_without_what_was_asked() -> None:
    asked = [["The capital of Italy is", "Vienna"]]
    records = [
        {"kind": "refused", "ids": ["a"], "asked": asked, "reason": "a key is not finite"},
        {"kind": "refused", "ids": ["b", "c"], "reason": "of an earlier release"},
    ]
    found = judge([row(1)], [], records)[1:]
    assert [(v.number, v.id, v.prompt, v.state) for v in found] == [
        (None, "a", "The capital of Italy is", "refused"),
        (None, "b", "", "refused"),
        (None, "c", "", "refused"),
    ]
    assert explain(found[0])[0] == "  refused: “The capital of Italy is” → “Vienna”"
    assert explain(found[1]) == ["  refused: 'b'", "    of an earlier release"]


def one_of_each() -> list[Verdict]:
    states = ("holds", "undone", "replaced", "refused", "forgotten", "fails", "never took", "left out")
    return [
        Verdict(None if s in ("refused", "left out") else n, f"id{n}", "p", "w", s) for n, s in enumerate(states, 1)
    ]


def test_counting() -> None:
    assert counts(one_of_each()) == {"made": 6, "in_model": 4, "holding": 1, "refused": 1, "left_out": 1}
    assert headline(one_of_each()) == "6 edits made, 1 holds; 1 replaced, 1 undone, 1 refused, 1 left out"
    unknown = [Verdict(1, "a", "p", "w", "not measured"), Verdict(2, "b", "p", "w", "undone")]
    assert headline(unknown) == "2 edits made, 1 in the model; whether they hold was not measured; 1 undone"
    assert headline([]) == "0 edits made, 0 hold"
    assert tuple(v.state for v in failures(one_of_each())) == FAILED
    assert tuple(v.state for v in to_tell(one_of_each())) == (*FAILED, "replaced", "undone")


def test_the_closing_words_stop_after_some_and_say_how_to_go_on() -> None:
    many = [Verdict(n, f"id{n}", "p", "w", "forgotten") for n in range(1, 14)]
    lines = closing_lines(many, "runs/x")
    assert lines[0] == "13 edits made, 0 hold"
    assert lines[10] == "  10 forgotten: “p” → “w”"
    assert lines[11] == "and 3 more: lit-edit log --run runs/x"
    assert "  lit-edit undo --run runs/x --edit 1,2,3,4,5,6,7,8,9,10  # the first 10 of 13" in lines
    assert closing_lines(many)[-1] == "and 3 more"  # of no run folder
    assert closing_lines([Verdict(1, "a", "p", "w", "holds")], "runs/x") == ["1 edit made, 1 holds"]
    undone = closing_lines([Verdict(1, "a", "p", "w", "undone")], "runs/x")
    assert undone[-2:] == ["  lit-edit log --run runs/x", "  lit-edit redo --run runs/x --edit 1"]


def test_a_line_is_a_line_whatever_stands_in_the_data() -> None:
    found = Verdict(1, "a", "two\nlines\x1b[31m", "w" * 300, "forgotten", "\n", ("a\nreason",))
    lines = explain(found)
    assert len(lines) == 2
    assert all(letter.isprintable() for line in lines for letter in line)
    assert len(lines[0]) < 200
