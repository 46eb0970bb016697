"""IKE: what is retrieved and put before a prompt is what one would put there by hand; the model is left as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_edit import EditRequest, EditStream, LanguageModel
from lit_edit.data.request import Probe
from lit_edit.editors import IKE
from lit_edit.editors.memory.ike import KINDS, Contexts, Demonstrations, Fact, demonstration
from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations, text_nlls
from lit_edit.models.generation import continue_greedily
from lit_edit.models.memory import Route
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import encode
from tests.editors.memory.words import WordEncoder
from tests.streams import FixedStatistics
from tests.tolerances import SINGLE, assert_near

REQUESTS = tiny_requests()
TOKENIZER = tiny_tokenizer()
WORDS = WordEncoder()
SHOWN = [
    {
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": new,
        "paraphrases": [f"{subject}'s capital is"],
        "neighborhood": [{"prompt": f"The capital of {other} is", "answer": answer}],
    }
    for subject, new, other, answer in (("Peru", "Oslo", "Chad", "Djamena"), ("Mali", "Lima", "Togo", "Lome"))
]


def fact(prompt: str, target: str, subject: str = "-") -> Fact:
    return Fact(prompt, subject, target, WORDS([prompt])[0])


def contexts(facts: Sequence[Fact], shown: Sequence[EditRequest] = (), **settings: Any) -> Contexts:
    chosen = {"count": len(shown), "edits": 1, "threshold": None, "tokens": 1000, **settings}
    return Contexts(facts, WORDS, TOKENIZER, Demonstrations(shown, WORDS), **chosen)


def put_before(memory: Contexts, prompt: str) -> str:
    routes = memory.routes([prompt])
    assert routes is not None
    return routes[0].context


# ---- what is put before a prompt ----------------------------------------------------------------------------------


def test_the_context_is_the_published_one() -> None:
    near = EditRequest("1", "{} is in", "Rome", "Asia", neighborhood=(Probe("Oslo is in", "Europe"),))
    far = EditRequest("2", "The author of {} was", "Emma", "Verne", paraphrases=("Emma was written by",))
    memory = contexts([fact("Paris is in", "Africa")], [far, near])
    assert put_before(memory, "Where is Paris? In") == (
        "New Fact: The author of Emma was Verne\nPrompt: Emma was written by Verne\n\n"
        "New Fact: Rome is in Asia\nPrompt: Rome is in Asia\n\n"
        "New Fact: Paris is in Africa\nPrompt: "
    )
    assert put_before(contexts([fact("Paris is in", "Africa")]), "x") == "New Fact: Paris is in Africa\nPrompt: "


def test_the_nearest_edit_is_found_where_it_is_near_enough() -> None:
    facts = [fact("a b c d", "one"), fact("a b x y", "two"), fact("x y z w", "three")]
    # "a b c x" shares three of four words with the first, three with the second, one with the third.
    asked = ["a b c e", "a b x q", "y z w x", "q r s t"]
    cosines = WORDS(asked) @ torch.stack([f.vector for f in facts]).T
    assert cosines.mul(4).round().tolist() == [[3, 2, 0], [2, 3, 1], [0, 2, 4], [0, 0, 0]]
    memory = contexts(facts, threshold=0.75)
    routes = memory.routes(asked)
    assert routes is not None
    assert ["one" in routes[0].context, "two" in routes[1].context, "three" in routes[2].context] == [True] * 3
    assert routes[3] == Route()
    assert [route == Route() for route in contexts(facts, threshold=0.76).routes(asked) or []] == [
        True,
        True,
        False,
        True,
    ]
    assert contexts([]).routes(asked) is None


def test_of_edits_that_are_alike_the_newest_is_meant_and_several_stand_with_the_nearest_last() -> None:
    facts = [fact("a b c d", "old"), fact("a b c d", "new"), fact("a b x y", "other")]
    assert put_before(contexts(facts), "a b c d") == "New Fact: a b c d new\nPrompt: "
    assert put_before(contexts(facts, edits=3), "a b c d") == (
        "New Fact: a b x y other\nNew Fact: a b c d old\nNew Fact: a b c d new\nPrompt: "
    )


def test_demonstrations_are_of_the_published_kinds_and_give_nothing_away() -> None:
    assert [KINDS.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]
    request = REQUESTS[0]
    assert demonstration(request, "copy") == (
        "New Fact: The capital of Italy is Vienna\nPrompt: The capital of Italy is Vienna\n\n"
    )
    assert demonstration(request, "update") == (
        "New Fact: The capital of Italy is Vienna\nPrompt: Well, The capital of Italy is Vienna\n\n"
    )
    assert demonstration(request, "retain", "The capital of Spain is ") is None
    shown = [EditRequest.from_dict({"id": str(i), **record}) for i, record in enumerate(SHOWN)]
    memory = contexts([fact("The capital of Peru is", "Kyiv", "peru")], shown)
    assert "Oslo" not in put_before(memory, "Peru's capital is")  # of the same subject
    assert "Lima" in put_before(memory, "Peru's capital is")
    assert "Lima" not in put_before(memory, "The capital of Mali is")  # would be the answer


def test_what_does_not_fit_is_left_out_the_least_like_first() -> None:
    near = (Probe("Oslo is in", "Europe"),)
    shown = [
        EditRequest(name, prompt, name, "Asia", paraphrases=(f"Where is {name}? In",), neighborhood=near)
        for name, prompt in (("Rome", "{} is in"), ("Bonn", "{} is at"))  # two of three words, and one
    ]
    facts = [fact("Paris is in", "Africa"), fact("Paris lies in", "Africa")]
    whole = put_before(contexts(facts, shown, edits=2), "Paris is in")
    assert whole.index("Bonn") < whole.index("Rome") < whole.index("Paris lies")
    prompt = len(encode(TOKENIZER, "Paris is in"))
    expected = [whole, whole[whole.index("New Fact: Rome") :], whole[whole.index("New Fact: Paris lies") :],
                "New Fact: Paris is in Africa\nPrompt: ", ""]  # fmt: skip
    for fits, less in pairwise(expected):
        length = len(encode(TOKENIZER, fits)) + prompt
        assert put_before(contexts(facts, shown, edits=2, tokens=length), "Paris is in") == fits
        assert put_before(contexts(facts, shown, edits=2, tokens=length - 1), "Paris is in") == less


# ---- the editor ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path) -> str:
    path = tmp_path / "shown.json"
    path.write_text(json.dumps(SHOWN))
    return str(path)


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edit.editors.memory.ike.load_encoder", lambda name: WordEncoder())


def session_of(shown: str, journal: Path | None = None, **settings: Any) -> EditSession:
    chosen = {"threshold": 0.7, "demonstrations": 2, "demonstration_path": shown, "tokens": 256, **settings}
    model = tiny_model("llama", max_position_embeddings=512)
    language_model = LanguageModel.of(model, TOKENIZER)
    file = None if journal is None else str(journal)
    return EditStream(language_model, IKE(**chosen), FixedStatistics(), journal=file).open()


def make(session: EditSession, requests: Sequence[EditRequest]) -> EditSession:
    for request in requests:
        proposal = session.propose([request], [request])
        assert proposal is not None
        session.apply(proposal)
    return session


def plain_nll(model: PreTrainedModel, before: str, text: str) -> torch.Tensor:
    """The nll of a text's tokens behind others, by the plain model."""
    ids = torch.tensor([(*encode(TOKENIZER, before), *encode(TOKENIZER, text))])
    start = len(encode(TOKENIZER, before))
    logp = model(ids).logits[0].log_softmax(-1)
    return -logp[range(start - 1, ids.shape[1] - 1), ids[0, start:]]


QUESTION = (
    "New Fact: The capital of Mali is Lima\nPrompt: Mali's capital is Lima\n\n"
    "New Fact: The capital of Peru is Oslo\nPrompt: The capital of Peru is Oslo\n\n"
    "New Fact: The capital of Italy is Vienna\nPrompt: "
)


def test_edits_are_answered_in_their_context_and_the_rest_as_ever(shown: str) -> None:
    session = make(session_of(shown), REQUESTS[:2])
    adapter, original = session.ledger.adapter, session.ledger.original()
    weights = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    prompt, target, far = "The capital of Italy is", "Vienna", "Hamlet was written by"
    assert adapter.routes([prompt, far]) == [Route(QUESTION), Route()]

    (scored,) = score_continuations(adapter, TOKENIZER, [(prompt, target)])
    assert scored.nll == score_continuations(original, TOKENIZER, [(QUESTION + prompt, target)])[0].nll
    probability = session.ledger.entries[0].facts["target_probability"]
    assert probability == pytest.approx(torch.exp(torch.tensor(-scored.nll)).item(), rel=1e-4)
    (one,), (other,) = (score_continuations(a, TOKENIZER, [(far, "Verne")]) for a in (adapter, original))
    assert (one.nll, one.choice.tolist()) == (other.nll, other.choice.tolist())
    assert continue_greedily(adapter, TOKENIZER, far, 4) == continue_greedily(original, TOKENIZER, far, 4)
    behind = continue_greedily(original, TOKENIZER, QUESTION + prompt, 4)
    assert continue_greedily(adapter, TOKENIZER, prompt, 4) == behind

    text = "The capital of Italy is a city."  # five of seven words are the edit's
    nlls = text_nlls(adapter, TOKENIZER, [text, far])
    expected = plain_nll(adapter.model, QUESTION, text)[1:]  # a text alone has no nll of its first token
    torch.testing.assert_close(nlls[0], expected, atol=1e-4, rtol=1e-4)
    # Beside another text, in a pass of another shape: not the same bits.
    assert_near(nlls[1], text_nlls(original, TOKENIZER, [far])[0], SINGLE)
    assert all(torch.equal(value, weights[name]) for name, value in adapter.model.state_dict().items())


def asked(session: EditSession) -> list[Route]:
    return session.ledger.adapter.routes([request.text for request in REQUESTS])


def test_edits_are_taken_out_put_back_and_taken_up_again(shown: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    session = make(session_of(shown, journal), REQUESTS[:3])
    whole = asked(session)
    assert [route == Route() for route in whole] == [False] * 3 + [True] * 3
    session.undo([2])
    assert asked(session) == [whole[0], Route(), whole[2], *[Route()] * 3]
    session.redo([2])
    assert asked(session) == whole
    session.undo([1])
    saved = session.editor.state_dict()
    kept = saved["kept"]
    assert list(kept) == ["2", "3"]
    again = session_of(shown, journal)  # replays the journal, and looks nothing up anew
    assert asked(again) == asked(session)
    assert torch.equal(again.editor.state_dict()["kept"]["3"]["vector"], kept["3"]["vector"])
    again.editor.load_state_dict(saved)
    assert asked(again) == asked(session)
    make(again, REQUESTS[3:4])
    assert [route == Route() for route in asked(again)] == [True, False, False, False, True, True]


def test_without_demonstrations_it_is_ice(shown: str) -> None:
    session = make(session_of(shown, demonstrations=0), REQUESTS[:1])
    assert asked(session)[0].context == "New Fact: The capital of Italy is Vienna\nPrompt: "


def test_a_journal_is_not_gone_on_with_under_other_demonstrations(shown: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    make(session_of(shown, journal), REQUESTS[:1])
    Path(shown).write_text(json.dumps(SHOWN[:1]))
    with pytest.raises(ValueError, match="made_of"):
        session_of(shown, journal)


def test_built_in_facts_demonstrate_by_default() -> None:
    session = make(session_of("", demonstration_path=None), REQUESTS[:1])
    assert asked(session)[0].context.count("New Fact: ") == 3


def test_what_cannot_work_is_said(shown: str) -> None:
    for settings, said in (
        ({"threshold": 1.5}, "threshold is a cosine"),
        ({"edits": 0}, "edits must be at least 1"),
        ({"demonstrations": -1}, "demonstrations must be at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            IKE(**settings)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the model reads 512 at most"):
        session_of(shown, tokens=513)
    with pytest.raises(ArgumentError, match="leaves no room"):
        session_of(shown, tokens=64)
    assert "sequential" in IKE.about.lacks
