"""GRACE, and with it what all editors have in common that keep their edits beside the weights."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_edit.cli.main import main
from lit_edit.editors.memory.grace import GRACE, Codebook, Entry, add_entry
from lit_edit.errors import ArgumentError
from lit_edit.export.model import ExportError, export_model
from lit_edit.metrics.evaluation import evaluate_edits
from lit_edit.metrics.scoring import score_continuations, text_nlls
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.generation import continue_greedily
from lit_edit.models.memory import Memory, Route
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation, encode
from tests.editors.gradient.test_gradient import equal, make, start, weights
from tests.tolerances import assert_near, rounding

REQUESTS = tiny_requests()
F64 = torch.float64


def grace(**options: Any) -> GRACE:
    return GRACE(**{"layer": 2, "radius": 0.05, "steps": 8, "lr": 0.5, **options})


def begin(model: Any = None, journal: Path | None = None, **options: Any) -> EditSession:
    return start(grace(**options), model, journal)  # type: ignore[arg-type]


def probabilities(session: EditSession) -> list[float]:
    results = evaluate_edits(session.ledger.adapter, tiny_tokenizer(), REQUESTS)
    return [math.exp(-result.efficacy[0].preferred) for result in results]


# ---- the codebook ----------------------------------------------------------------------------------------------------


def entry(place: float, label: str = "Rome", radius: float = 1.0) -> Entry:
    return Entry(torch.tensor([place, 0.0]), torch.tensor([place, 1.0, 2.0]), radius, label)


@pytest.mark.parametrize(
    ("held", "new", "radii"),
    [
        ([], entry(5), [1.0]),
        ([entry(0)], entry(2.5), [1.0, 1.0]),  # out of reach of each other
        ([entry(0)], entry(1.5), [1.5, 1.0]),  # the same target: the old one widens
        ([entry(0)], entry(0.5), [1.0, 1.0]),  # and never shrinks
        ([entry(0)], entry(1.5, "Oslo"), [0.75, 0.75]),  # another one: half each
        ([entry(0, radius=0.25)], entry(1.0, "Oslo"), [0.25, 0.5]),  # and never grows
        ([entry(0), entry(10)], entry(11, "Oslo"), [1.0, 0.5, 0.5]),  # the nearest counts
    ],
)
def test_radii(held: list[Entry], new: Entry, radii: list[float]) -> None:
    assert [e.radius for e in add_entry(held, new)] == radii


def test_the_nearest_entry_answers_within_its_radius() -> None:
    book = Codebook(1, [entry(0), entry(10, radius=2.0), entry(10, "Oslo", radius=2.0)])
    book.values[2] = 7.0
    inputs = torch.tensor([[[0.9, 0.0], [1.1, 0.0], [8.5, 0.0], [7.0, 0.0]]])
    outputs = torch.full((1, 4, 3), -1.0)
    patch = book.patches()[1]
    said = patch(inputs, outputs)[0].tolist()
    assert said == [[0.0, 1.0, 2.0], [-1.0] * 3, [7.0] * 3, [-1.0] * 3]  # of two at one place the newest
    assert not Codebook(1).patches()


def test_of_two_entries_that_round_off_alone_tells_apart_the_newest_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 512, generator=generator)
    keys[39] = keys[7] * (1 + 1e-6)
    book = Codebook(1, [Entry(key, torch.full((1,), float(n)), 0.5, str(n)) for n, key in enumerate(keys)])
    said = book.patches()[1](keys, torch.full((40, 1), -1.0))[:, 0].tolist()
    assert said == [float(n) if n != 7 else 39.0 for n in range(40)]


# ---- the model with its memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2"])
def test_packed_passes_equal_a_plain_model_with_a_hook(family: str) -> None:
    """The whole of GRACE once more: hooks on the transformers model, one row at a time."""
    model, tokenizer = tiny_model(family, F64), tiny_tokenizer()
    session = make(begin(model), REQUESTS[:3])
    book = session.ledger.adapter.memory
    assert isinstance(book, Codebook)

    def look_up(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        for place in range(output.shape[1]):
            found = [(float((args[0][0, place] - e.key).norm()), e) for e in book.entries]
            distance, nearest = min(found, key=lambda pair: pair[0])
            if distance <= nearest.radius:
                output[0, place] = nearest.value
        return output

    plain = tiny_model(family, F64)
    pairs = [(r.text, r.target_new) for r in REQUESTS] + [(r.paraphrases[0], r.target_new) for r in REQUESTS]
    text = REQUESTS[0].text + " a place that everybody has heard of"
    handle = ModelAdapter(plain).down_proj(2).register_forward_hook(look_up)

    def naive(prompt: Any, target: Any) -> float:
        with torch.no_grad():
            logp = plain(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1).double()
        return -sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(target)) / len(target)

    for pair, score in zip(pairs, score_continuations(session.ledger.adapter, tokenizer, pairs), strict=True):
        assert score.nll == pytest.approx(naive(*continuation(tokenizer, *pair)), abs=2e-6)
    ids = encode(tokenizer, text)
    assert float(text_nlls(session.ledger.adapter, tokenizer, [text])[0].mean()) == pytest.approx(
        naive(ids[:1], ids[1:]), abs=2e-6
    )
    handle.remove()
    unedited = [naive(*continuation(tokenizer, *pair)) for pair in pairs[:3]]
    edited = [score.nll for score in score_continuations(session.ledger.adapter, tokenizer, pairs[:3])]
    assert all(before - after > 0.1 for before, after in zip(unedited, edited, strict=True))


def test_the_model_itself_is_left_alone_but_inside_patched() -> None:
    model = tiny_model("llama", F64)
    ids = torch.tensor([encode(tiny_tokenizer(), REQUESTS[0].text)])
    before = model(ids).logits
    session = make(begin(model), REQUESTS[:2])
    adapter = session.ledger.adapter
    assert torch.equal(model(ids).logits, before)
    with adapter.patched():
        assert not torch.allclose(model(ids).logits[0, -1], before[0, -1], atol=1e-3)
        assert torch.equal(model(ids).logits[0, :-1], before[0, :-1])  # only the last token's key is in the codebook
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
    pairs = [(REQUESTS[0].text, "Vienna")]
    untouched = ModelAdapter(tiny_model("llama", F64))
    found, wanted = (score_continuations(a, tiny_tokenizer(), pairs) for a in (session.ledger.original(), untouched))
    assert found[0].nll == wanted[0].nll


def test_what_takes_everything_back_takes_the_memory_back() -> None:
    session = make(begin(), REQUESTS[:2])
    before = probabilities(begin())
    assert probabilities(session) != before
    session.ledger.restore_base()
    assert probabilities(session) == before


def test_there_is_no_edited_model_to_export(tmp_path: Path) -> None:
    session = make(begin(), REQUESTS[:1])
    with pytest.raises(ExportError, match="kept beside the weights"):
        export_model(session.ledger.adapter.model, tiny_tokenizer(), session.ledger, tmp_path / "out", "tiny")
    assert not (tmp_path / "out").exists()


def test_generation_uses_the_memory() -> None:
    session = make(begin(tiny_model("llama"), steps=60), REQUESTS[:1])
    target = continuation(tiny_tokenizer(), REQUESTS[0].text, REQUESTS[0].target_new)[1]
    said = continue_greedily(session.ledger.adapter, tiny_tokenizer(), REQUESTS[0].text, 1)
    assert said == tiny_tokenizer().decode(target[:1]).strip()
    assert said != continue_greedily(session.ledger.original(), tiny_tokenizer(), REQUESTS[0].text, 1)


def test_edits_take_and_nothing_else_changes() -> None:
    session = begin(steps=40)
    before = probabilities(session)
    make(session, REQUESTS[:3])
    after = probabilities(session)
    assert all(b > 1.5 * a for a, b in zip(before[:3], after[:3], strict=True))
    assert after[3:] == before[3:]
    assert equal(weights(session), dict(tiny_model("llama", F64).named_parameters()))
    facts = session.ledger.entries[0].facts
    assert facts["target_probability"] == pytest.approx(after[0], rel=1e-6)
    assert facts["target_probability_before"] == pytest.approx(before[0], rel=1e-6)


# ---- transactions ----------------------------------------------------------------------------------------------------


def held(session: EditSession) -> dict[str, Tensor]:
    memory = session.ledger.adapter.memory
    assert isinstance(memory, Codebook)
    if not memory.entries:
        return {}
    return {"keys": memory.keys, "values": memory.values, "radii": memory.radii}


def test_undo_is_as_if_the_edit_had_never_been() -> None:
    session = make(begin(), REQUESTS[:3])
    whole = held(session)
    session.undo([2])
    assert equal(held(session), held(make(begin(), [REQUESTS[0], REQUESTS[2]])))
    session.redo([2])
    assert equal(held(session), whole)
    session.undo([1, 2, 3])
    assert held(session) == {}


def test_a_second_edit_of_a_fact_replaces_the_first() -> None:
    import dataclasses

    session = make(begin(), REQUESTS[:2])
    make(session, [dataclasses.replace(REQUESTS[0], id="again", target_new="Oslo")])
    assert [e.id for e in session.ledger.entries] == ["1", "again"]
    assert [e.label for e in session.ledger.adapter.memory.entries] == ["Greek", "Oslo"]  # type: ignore[union-attr]


def test_a_journal_is_done_again_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(begin(journal=tmp_path / "j"), REQUESTS[:3])
    session.undo([2])
    session.redo([2])
    session.undo([1])
    make(session, REQUESTS[3:], batch=3)
    monkeypatch.setattr(GRACE, "learn", None)  # nothing is fitted anew
    again = begin(journal=tmp_path / "j")
    again.repeat_all()
    assert equal(held(again), held(session))


def test_a_resumed_stream_equals_an_uninterrupted_one() -> None:
    whole, first = make(begin(), REQUESTS[:4]), make(begin(), REQUESTS[:2])
    file = io.BytesIO()
    torch.save({"editor": first.editor.state_dict(), "ledger": first.ledger.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = begin()
    second.ledger.load_state_dict(state["ledger"])
    second.editor.load_state_dict(state["editor"])
    make(second, REQUESTS[2:4])
    assert equal(held(second), held(whole))


def test_a_preview_shows_what_would_be() -> None:
    session = make(begin(), REQUESTS[:2])
    before = probabilities(session)
    proposal = session.editor.retract(session.ledger.facts_of([2]))
    view = session.preview(proposal)
    seen = [r.efficacy[0].preferred for r in evaluate_edits(view, tiny_tokenizer(), REQUESTS[:2])]
    assert probabilities(session) == before
    session.undo([2])
    # Of all edits in one pass: in another shape, and Llama's norms are float32.
    assert [math.exp(-nll) for nll in seen] == pytest.approx(probabilities(session)[:2], rel=rounding("llama"))


def test_an_edit_that_diverges_is_refused_and_nothing_kept() -> None:
    session = make(begin(), REQUESTS[:1])
    before = held(session)
    session.editor.lr = math.inf
    with pytest.raises(FloatingPointError, match="edit '1'"):
        session.propose([REQUESTS[1]])
    assert equal(held(session), before)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layer": -1}, "layer"),
        ({"radius": 0.0}, "radius"),
        ({"steps": 0}, "steps"),
        ({"lr": math.nan}, "lr"),
        ({"loss_threshold": -1.0}, "loss_threshold"),
        ({"start": "hot"}, "start"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        grace(**wrong)


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ArgumentError, match="layer 9 does not exist"):
        begin(layer=9)


# ---- routes ----------------------------------------------------------------------------------------------------------


CONTEXT = "It is said that things change.\n"


class Signpost(Memory):
    """Puts a text before prompts about Italy, and has another model answer those about Nokia."""

    def __init__(self, other: ModelAdapter) -> None:
        self.other = other

    def routes(self, prompts: Any) -> list[Route]:
        return [self.route(prompt) for prompt in prompts]

    def route(self, prompt: str) -> Route:
        return Route(CONTEXT) if "Italy" in prompt else Route(adapter=self.other if "Nokia" in prompt else None)


def test_prompts_are_answered_along_their_routes() -> None:
    tokenizer = tiny_tokenizer()
    base, other = ModelAdapter(tiny_model("llama", F64)), ModelAdapter(tiny_model("llama", F64, seed=1))
    view = base.with_memory(Signpost(other))
    pairs = [(r.text, r.target_new) for r in REQUESTS]
    found = [score.nll for score in score_continuations(view, tokenizer, pairs)]
    rest = [(CONTEXT + pairs[0][0], pairs[0][1]), *pairs[1:5]]
    wanted = [score.nll for score in score_continuations(base, tokenizer, rest)]
    wanted.append(score_continuations(other, tokenizer, pairs[5:])[0].nll)
    near = rounding("llama")  # each in a pass of another shape
    assert found == pytest.approx(wanted, rel=near)
    texts = [f"{r.text} {r.target_new} or not." for r in REQUESTS]
    seen = text_nlls(view, tokenizer, texts)
    with_context = text_nlls(base, tokenizer, [CONTEXT + texts[0]])[0]
    assert len(seen[0]) == len(encode(tokenizer, texts[0])) - 1
    assert_near(seen[0], with_context[-len(seen[0]) :], near)
    assert_near(seen[1], text_nlls(base, tokenizer, texts[1:2])[0], near)
    assert_near(seen[5], text_nlls(other, tokenizer, texts[5:])[0], near)
    for prompt, model, before in ((pairs[0][0], base, CONTEXT), (pairs[5][0], other, "")):
        assert continue_greedily(view, tokenizer, prompt, 4) == continue_greedily(model, tokenizer, before + prompt, 4)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_a_run_from_beginning_to_end(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", "--config", "method/grace", f"--model.language_model.name={tiny_folder}"]
    args += ["--data.limit=3", "--model.editor.init_args.layer=2", "--model.editor.init_args.radius=0.05"]
    args += ["--model.editor.init_args.steps=5", "--trainer.accelerator=cpu", "--run_name=x"]
    assert main(args) == 0
    out, run = capsys.readouterr().out, Path("runs/x")
    assert "lit-edit export" not in out
    assert "mean |W|" not in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["edits"] == 3
    assert summary["layers"] == {}
    assert summary["final"]["efficacy"] != summary["base"]["efficacy"]
    assert summary["final"]["locality"]["agreement"] == 1.0
    prompt = json.loads((run / "ledger" / "edits.jsonl").read_text().splitlines()[0])["prompt"]
    assert main(["ask", "--run", "runs/x", prompt]) == 0
    cells = [line.split("│")[2:4] for line in capsys.readouterr().out.splitlines() if prompt[:8] in line]
    assert cells[0][0].strip() != cells[0][1].strip()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("radius: 0.05", "radius: 5.0"))
    assert main(["ask", "--run", "runs/x", prompt]) == 2
    assert "radius 0.05, now 5.0" in capsys.readouterr().err
    (run / "config.yaml").write_text(config)
    assert main(["undo", "--run", "runs/x", "--last", "1"]) == 0
    assert json.loads((run / "summary.json").read_text())["edits"] == 2
    capsys.readouterr()
    assert main(["export", "--run", "runs/x"]) == 2
    assert "kept beside the weights" in capsys.readouterr().err
    assert not (run / "edited").exists()
