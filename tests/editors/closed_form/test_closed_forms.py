"""Every closed-form method against its textbook formula, on a model that is run by transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit import D4S, EditRequest, EditStream, KeyStatistics, LanguageModel, TargetSettings
from lit_edit.editors import EMMET, ENCORE, MEMIT, NSE, PMET, ROME, RROME, AlphaEdit, Editor, MEMITSeq, RLSEdit
from lit_edit.editors.closed_form.alphaedit import null_space
from lit_edit.editors.closed_form.located import LocatedEditor
from lit_edit.editors.transforms.interpolate import Interpolate
from lit_edit.editors.transforms.norm_anchor import NormAnchor
from lit_edit.editors.transforms.prune import PRUNE
from lit_edit.editors.transforms.rect import RECT
from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError, constrained_update, ridge_update
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.subspace import SubspaceSolver
from lit_edit.stream.session import EditSession
from lit_edit.targets.optimize import optimise_targets
from lit_edit.targets.problem import build_problem
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

F64 = torch.float64
LAYER, REQUESTS = 1, tiny_requests()
CONTEXTS = [["{}"], ["Well. {}", "So it is. {}"]]
TARGET = TargetSettings(steps=4)
ENGINE: dict[str, Any] = {"contexts": CONTEXTS, "target": TARGET}

# The shared tester's rows: a new closed-form editor is one more.
ROWS: dict[str, tuple[type[LocatedEditor], dict[str, Any]]] = {
    "d4s": (D4S, {"layers": [1, 2], "covariance_weight": 5.0}),
    "memit": (MEMIT, {"layers": [1, 2], "covariance_weight": 5.0}),
    "memit_seq": (MEMITSeq, {"layers": [1, 2], "covariance_weight": 5.0}),
    "rlsedit": (RLSEdit, {"layers": [1, 2], "covariance_weight": 5.0, "frobenius": 0.5}),
    "encore": (ENCORE, {"layers": [1, 2], "covariance_weight": 5.0, "frobenius": 2.0}),
    "alphaedit": (AlphaEdit, {"layers": [1, 2], "weight": 3.0, "explained": 0.5}),
    "rome": (ROME, {"layers": [1]}),
    "rrome": (RROME, {"layers": [1]}),
    "emmet": (EMMET, {"layers": [1], "covariance_weight": 5.0}),
    "nse": (NSE, {"layers": [1, 2], "covariance_weight": 5.0, "neurons": 0.7, "lower": 0.0}),
    "pmet": (PMET, {"layers": [1, 2], "covariance_weight": 5.0, "target": TargetSettings(steps=4, moved="modules")}),
    "rect": (MEMIT, {"layers": [1, 2], "covariance_weight": 5.0, "transforms": [RECT(keep=0.4)]}),
    "prune": (D4S, {"layers": [1, 2], "covariance_weight": 0.01, "transforms": [PRUNE()]}),
    "1-li": (AlphaEdit, {"layers": [1, 2], "explained": 0.5, "transforms": [Interpolate(0.7)]}),
}
every_row = pytest.mark.parametrize("row", ROWS)


class SomeStatistics(KeyStatistics):
    """Second moments without text, of no special shape."""

    def compute(self, adapter: Any, tokenizer: Any, layers: Any, progress: Any = None) -> dict[int, Tensor]:
        return {layer: moment_of(layer, adapter.shape(layer)[1]) for layer in layers}


def moment_of(layer: int, d_in: int) -> Tensor:
    keys = torch.randn(d_in, 3 * d_in, dtype=F64, generator=torch.Generator().manual_seed(layer))
    return keys @ keys.T / keys.shape[1]


def open_session(
    editor: LocatedEditor, model_type: str = "gpt2", dtype: torch.dtype = F64, journal: Path | None = None
) -> EditSession:
    language_model = LanguageModel.of(tiny_model(model_type, dtype), tiny_tokenizer())
    return EditStream(language_model, editor, SomeStatistics(), journal=str(journal) if journal else None).open()


def editor_of(row: str, **settings: Any) -> LocatedEditor:
    kind, own = ROWS[row]
    return kind(**{**ENGINE, **own, **settings})


def make(session: EditSession, requests: Sequence[EditRequest], batch: int = 1) -> EditSession:
    for first in range(0, len(requests), batch):
        step = requests[first : first + batch]
        proposal = session.propose(step, step)
        assert proposal is not None
        session.apply(proposal)
    return session


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A saved state by paths, without what is fitted and not yet used."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, part in tree.items() if name != "targets" for k, v in flat(part, f"{prefix}/{name}").items()}


def deltas(session: EditSession) -> list[Tensor]:
    return list(session.ledger.deltas.values())


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---- the textbook ----------------------------------------------------------------------------------------------------


class Textbook:
    """One layer of a GPT-2 edited by formulas on dense matrices; keys come from forward hooks."""

    def __init__(self, target: TargetSettings) -> None:
        self.model = tiny_model("gpt2", F64)
        self.target = target
        self.module: Any = self.model.transformer.h[LAYER].mlp.c_proj
        self.base = self.weight.clone()
        self.moment = moment_of(LAYER, self.weight.shape[1])
        self.past = torch.empty(self.moment.shape[0], 0, dtype=F64)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.data.T  # Conv1D

    def facts(self, requests: Sequence[EditRequest], flat: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Mean keys, plain keys, and what the targets add to the states, each with a column per request."""
        templates = (tuple(t for g in CONTEXTS for t in g),) if flat else tuple(map(tuple, CONTEXTS))
        problems = [build_problem(tiny_tokenizer(), request, templates) for request in requests]
        shifts = [t.delta for t in optimise_targets(ModelAdapter(self.model), problems, LAYER, self.target)]
        means, plains = [], []
        for problem in problems:
            keys = [self.key(prompt.ids[: prompt.lookup + 1]) for prompt in problem.prompts]
            means.append(sum(keys) / len(keys) if flat else keys[0] / 2 + sum(keys[1:]) / (2 * len(keys[1:])))
            plains.append(keys[0])
        return torch.stack(means, 1), torch.stack(plains, 1), torch.stack(shifts, 1)

    def key(self, ids: Sequence[int]) -> Tensor:
        found: list[Tensor] = []
        handle = self.module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0, -1]))
        self.model(torch.tensor([ids]))
        handle.remove()
        return found[0]

    def run(self, update: Callable[..., Tensor], count: int, batch: int = 1, flat: bool = False) -> Tensor:
        for first in range(0, count, batch):
            keys, plain, shifts = self.facts(REQUESTS[first : first + batch], flat)
            change = update(self, keys, plain, shifts)
            self.module.weight.data += change.T
            self.past = torch.cat([self.past, keys], 1)
        return self.weight - self.base


def memit(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
    return shifts @ keys.T @ torch.linalg.inv(5 * book.moment + keys @ keys.T)


def memit_seq(beta: float) -> Callable[..., Tensor]:
    def update(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
        system = 5 * book.moment + beta * torch.eye(len(keys), dtype=F64) + book.past @ book.past.T + keys @ keys.T
        return shifts @ keys.T @ torch.linalg.inv(system)

    return update


def alphaedit(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
    left, values, _ = torch.linalg.svd(book.moment)  # as released: descending
    energy = values.cumsum(0) / values.sum()
    null = left[:, int((energy < 0.5).sum()) + 1 :]
    project = null @ null.T
    system = project @ (keys @ keys.T + book.past @ book.past.T) + 3 * torch.eye(len(keys), dtype=F64)
    return torch.linalg.solve(system, project @ keys @ shifts.T).T


def rome(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
    u = torch.linalg.solve(book.moment, keys)
    return shifts @ u.T / (plain.T @ u)


def rrome(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
    u = torch.linalg.solve(book.moment, keys)
    return (book.weight @ plain + shifts - book.weight @ keys) @ u.T / (keys.T @ u)


def emmet(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
    inverse, count = torch.linalg.inv(5 * book.moment), keys.shape[1]
    slack = (0.1 if count > 1 else 0.0) * torch.eye(count, dtype=F64)
    return shifts @ torch.linalg.inv(keys.T @ inverse @ keys + slack) @ keys.T @ inverse


ANCHORED = TargetSettings(steps=4, anchor="mlp")


def nse(book: Textbook, keys: Tensor, plain: Tensor, shifts: Tensor) -> Tensor:
    order = keys.abs().sum(1).argsort(descending=True)
    mass = keys.abs().sum(1)[order].cumsum(0)
    chosen = order[: int((mass < 0.7 * mass[-1]).sum()) + 1]
    system = 5 * book.moment + book.past @ book.past.T + keys @ keys.T
    change = torch.zeros_like(book.weight)
    change[:, chosen] = shifts @ keys[chosen].T @ torch.linalg.inv(system[chosen][:, chosen])
    return change


@pytest.mark.parametrize(
    ("editor", "formula", "batch", "flat"),
    [
        (MEMIT(layers=[LAYER], covariance_weight=5.0, **ENGINE), memit, 1, False),
        (MEMIT(layers=[LAYER], covariance_weight=5.0, **ENGINE), memit, 3, False),
        (MEMITSeq(layers=[LAYER], covariance_weight=5.0, **ENGINE), memit_seq(0.0), 1, False),
        (MEMITSeq(layers=[LAYER], covariance_weight=5.0, **ENGINE), memit_seq(0.0), 3, False),
        (RLSEdit(layers=[LAYER], covariance_weight=5.0, frobenius=0.5, **ENGINE), memit_seq(0.5), 2, False),
        (ENCORE(layers=[LAYER], covariance_weight=5.0, frobenius=2.0, **ENGINE), memit_seq(2.0), 1, False),
        (AlphaEdit(layers=[LAYER], weight=3.0, explained=0.5, **ENGINE), alphaedit, 1, False),
        (AlphaEdit(layers=[LAYER], weight=3.0, explained=0.5, **ENGINE), alphaedit, 3, False),
        (ROME(layers=[LAYER], contexts=CONTEXTS, target=ANCHORED), rome, 1, True),
        (RROME(layers=[LAYER], contexts=CONTEXTS, target=ANCHORED), rrome, 1, True),
        (EMMET(layers=[LAYER], covariance_weight=5.0, **ENGINE), emmet, 1, False),
        (EMMET(layers=[LAYER], covariance_weight=5.0, **ENGINE), emmet, 3, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Editor) else None,
)
def test_a_method_is_its_textbook_formula(
    editor: LocatedEditor, formula: Callable[..., Tensor], batch: int, flat: bool
) -> None:
    (found,) = deltas(make(open_session(editor), REQUESTS, batch))
    wanted = Textbook(editor.target).run(formula, len(REQUESTS), batch, flat)
    assert float(wanted.norm()) > 1e-3
    assert distance(found, wanted) < 1e-9


# ---- identities ------------------------------------------------------------------------------------------------------


def some_facts(count: int, d_in: int = 12, d_out: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    root = torch.randn(d_in, 3 * d_in, dtype=F64, generator=generator)
    keys = torch.randn(d_in, count, dtype=F64, generator=generator)
    return keys, torch.randn(d_out, count, dtype=F64, generator=generator), root @ root.T / 10


def test_emmet_with_one_edit_is_rome_with_one_key() -> None:
    keys, residuals, prior = some_facts(1)
    u = torch.linalg.solve(prior, keys)
    assert distance(constrained_update(keys, residuals, prior), residuals @ u.T / (keys.T @ u)) < 1e-12


def test_emmet_edits_as_rrome_does_where_all_contexts_are_the_plain_prompt() -> None:
    settings: dict[str, Any] = {"contexts": [["{}"]], "layers": [LAYER]}
    one = make(open_session(EMMET(covariance_weight=5.0, target=ANCHORED, **settings)), REQUESTS[:3])
    for kind in (ROME, RROME):  # and these are then the same
        other = make(open_session(kind(target=ANCHORED, **settings)), REQUESTS[:3])
        assert distance(deltas(one)[0], deltas(other)[0]) < 1e-9


def test_memit_tends_to_emmet_as_lambda_vanishes() -> None:
    keys, residuals, prior = some_facts(4)
    exact = constrained_update(keys, residuals, prior)
    off = [distance(ridge_update(keys, residuals, weight * prior), exact) for weight in (1e-1, 1e-3, 1e-5)]
    assert off[0] > 10 * off[1] > 100 * off[2]
    assert off[2] < 1e-5


def test_slack_one_is_least_squares() -> None:
    keys, residuals, prior = some_facts(4)
    assert distance(constrained_update(keys, residuals, prior, 1.0), ridge_update(keys, residuals, prior)) < 1e-12


def test_constrained_facts_hold_and_nothing_smaller_does_it() -> None:
    keys, residuals, prior = some_facts(4)
    delta = constrained_update(keys, residuals, prior)
    torch.testing.assert_close(delta @ keys, residuals)
    away = torch.randn(5, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    away -= away @ keys @ torch.linalg.pinv(keys)  # leaves the facts alone
    cost = [float(torch.trace((delta + step * away) @ prior @ (delta + step * away).T)) for step in (0, 0.1, -0.1)]
    assert cost[0] < min(cost[1:])


def test_facts_that_contradict_each_other_cannot_hold_exactly() -> None:
    keys, residuals, prior = some_facts(2)
    keys[:, 1] = keys[:, 0]
    with pytest.raises(FactsError, match=r"nearly the same key.*slack"):
        constrained_update(keys, residuals, prior)
    assert torch.isfinite(constrained_update(keys, residuals, prior, 0.1)).all()


def test_rlsedit_is_memit_with_memory_and_its_prior() -> None:
    rls = make(open_session(editor_of("rlsedit")), REQUESTS)
    seq = make(open_session(editor_of("memit_seq", frobenius=0.5)), REQUESTS)
    for one, other in zip(deltas(rls), deltas(seq), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch", [1, 2])
def test_alphaedit_leaves_preserved_keys_alone(batch: int) -> None:
    editor = AlphaEdit(layers=[LAYER], weight=3.0, explained=0.5, **ENGINE)
    session = make(open_session(editor), REQUESTS, batch)
    moment = moment_of(LAYER, session.ledger.adapter.shape(LAYER)[1])
    _, vectors = torch.linalg.eigh(moment)
    preserved = vectors[:, null_space(moment, 0.5).shape[1] :]
    (delta,) = deltas(session)
    assert preserved.shape[1] > 0
    assert float((delta @ preserved).norm() / delta.norm()) < 1e-12


def test_null_space_by_energy_and_by_threshold() -> None:
    moment = torch.diag(torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=F64))
    assert null_space(moment, explained=0.69).abs().tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]
    assert null_space(moment, explained=0.70).shape[1] == 2  # 7 of 10 is enough
    assert null_space(moment, explained=0.71).shape[1] == 1
    assert null_space(moment, explained=0.5, threshold=3.5).shape[1] == 3
    with pytest.raises(ArgumentError, match="no direction"):
        null_space(moment, explained=0.5, threshold=0.5)
    with pytest.raises(ArgumentError, match="no direction"):
        null_space(moment, explained=0.99)


def test_d4s_of_singles_is_one_batch() -> None:
    one = make(open_session(D4S(layers=[LAYER], covariance_weight=5.0, **ENGINE)), REQUESTS, 1)
    all_ = make(open_session(D4S(layers=[LAYER], covariance_weight=5.0, **ENGINE)), REQUESTS, len(REQUESTS))
    assert distance(deltas(one)[0], deltas(all_)[0]) < 1e-9


@pytest.mark.parametrize("transform", [RECT(keep=1.0), Interpolate(1.0)], ids=["RECT", "1-LI"])
@pytest.mark.parametrize("row", ["d4s", "memit", "alphaedit", "rome"])
def test_transforms_that_do_nothing_change_no_bit(row: str, transform: Any) -> None:
    plain = make(open_session(editor_of(row)), REQUESTS[:3])
    other = make(open_session(editor_of(row, transforms=[transform])), REQUESTS[:3])
    assert all(torch.equal(a, b) for a, b in zip(deltas(plain), deltas(other), strict=True))


def test_transforms_are_applied_in_order_to_the_whole_update() -> None:
    plain = make(open_session(editor_of("d4s", layers=[1])), REQUESTS[:3])
    both = make(open_session(editor_of("d4s", layers=[1], transforms=[Interpolate(0.5), RECT(keep=0.3)])), REQUESTS[:3])
    ledger = both.ledger
    base = ledger.adapter.to_layout(1, ledger.base[ledger.names[1]]).double()
    torch.testing.assert_close(deltas(both)[0], RECT(keep=0.3)(0.5 * deltas(plain)[0], base))


def test_norm_anchor_gives_what_is_written_the_reference_length(caplog: pytest.LogCaptureFixture) -> None:
    request = REQUESTS[0]

    def written(**settings: Any) -> tuple[Tensor, Tensor]:
        session = make(open_session(editor_of("alphaedit", layers=[1], **settings)), [request])
        (facts,) = session.ledger.facts_of([1])
        return facts.tensors["targets"][:, 0], facts.tensors["shifts"][:, 0]

    target, shift = written()
    problem = build_problem(tiny_tokenizer(), request, tuple(map(tuple, CONTEXTS)))
    model = tiny_model("gpt2", F64)
    (fitted,) = optimise_targets(ModelAdapter(model), [problem], 1, TARGET, outputs=True)
    assert fitted.output is not None
    found: list[Tensor] = []
    model.transformer.h[1].mlp.c_proj.register_forward_hook(lambda _, inputs, output: found.append(output[0]))
    model(torch.tensor([problem.prompts[0].ids]))
    output = found[0][problem.prompts[0].lookup]
    torch.testing.assert_close(fitted.output, output)

    anchored, _ = written(norm_anchor=NormAnchor(reference=2.5, factor=100.0))
    value, before = anchored - (target - shift - output), output + shift
    assert float(value.norm()) == pytest.approx(2.5)
    torch.testing.assert_close(value / value.norm(), before / before.norm())

    caplog.clear()
    _, nothing = written(norm_anchor=NormAnchor(reference=0.01))
    assert float(nothing.norm()) == 0
    assert "changes nothing" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gemma3_text"])
def test_the_output_that_is_anchored_is_what_the_mlp_adds(model_type: str) -> None:
    model = tiny_model(model_type, F64)
    adapter = ModelAdapter(model)
    problem = build_problem(tiny_tokenizer(), REQUESTS[0], (("{}",),))
    (fitted,) = optimise_targets(adapter, [problem], 1, TargetSettings(steps=1), outputs=True)
    block, prompt = adapter.layers[1], problem.prompts[0]
    place = adapter.spec.output_norm or adapter.spec.down_proj
    found: list[Tensor] = []
    block.get_submodule(place).register_forward_hook(lambda _, inputs, output: found.append(output.reshape(-1, 32)))
    model(torch.tensor([prompt.ids]))
    assert fitted.output is not None
    torch.testing.assert_close(fitted.output, found[0][prompt.lookup], rtol=1e-5, atol=1e-5)


def test_the_reference_length_is_measured_once_and_put_on_record(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layers": [1], "norm_anchor": NormAnchor(samples=5, factor=100.0)}
    session = make(open_session(editor_of("memit", **settings), journal=tmp_path / "journal"), REQUESTS[:2])
    length = session.editor.opening()["reference"]
    assert length > 0
    again = open_session(editor_of("memit", **settings), journal=tmp_path / "journal")
    assert again.editor._reference == length  # type: ignore[attr-defined]
    again.repeat_all()
    assert torch.equal(deltas(again)[0], deltas(session)[0])


def test_spreading_over_the_ends_leaves_the_layers_between_alone() -> None:
    session = make(open_session(editor_of("memit", layers=[0, 1, 2], residual="ends")), REQUESTS[:2])
    norms = [float(delta.norm()) for delta in deltas(session)]
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2] > 0


# ---- what all of them must do ----------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # the other tests are on GPT-2
def test_edits_of_every_family(row: str, model_type: str) -> None:
    if row == "pmet" and model_type == "gemma2":
        with pytest.raises(ArgumentError, match="normalises what the MLP says"):
            open_session(editor_of(row), model_type)
        return
    session = make(open_session(editor_of(row), model_type, torch.float32), REQUESTS[:2])
    assert all(torch.isfinite(delta).all() and delta.norm() > 0 for delta in deltas(session))
    assert [entry.number for entry in session.ledger.entries] == [1, 2]


@every_row
def test_a_proposal_changes_nothing(row: str) -> None:
    session = make(open_session(editor_of(row)), REQUESTS[:2])
    model = session.ledger.adapter.model
    before, state = deepcopy(model.state_dict()), flat(deepcopy(session.editor.state_dict()))
    session.propose(REQUESTS[2:3], REQUESTS[2:3])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = flat(session.editor.state_dict())
    for name, value in state.items():
        assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]


@every_row
def test_a_journal_is_repeated_bit_for_bit(row: str, tmp_path: Path) -> None:
    first = make(open_session(editor_of(row), journal=tmp_path / "journal"), REQUESTS[:4])
    first.undo([2])
    first.redo([2])
    again = open_session(editor_of(row), journal=tmp_path / "journal")
    again.repeat_all()
    assert all(torch.equal(a, b) for a, b in zip(deltas(first), deltas(again), strict=True))


@every_row
def test_a_saved_state_goes_on_as_if_nothing_had_been(row: str) -> None:
    whole = make(open_session(editor_of(row)), REQUESTS[:4])
    cut = make(open_session(editor_of(row)), REQUESTS[:2])
    other = open_session(editor_of(row))
    other.ledger.load_state_dict(deepcopy(cut.ledger.state_dict()))
    state = deepcopy(cut.editor.state_dict())
    other.editor.check_state(state, other.ledger.layers)
    other.editor.load_state_dict(state)
    make(other, REQUESTS[2:4])
    assert all(torch.equal(a, b) for a, b in zip(deltas(whole), deltas(other), strict=True))


@every_row
def test_edits_are_taken_out_and_put_back(row: str) -> None:
    session = make(open_session(editor_of(row)), REQUESTS[:4])
    before = deltas(session)
    session.undo([2, 4])
    assert all(distance(a, b) > 1e-3 for a, b in zip(deltas(session), before, strict=True))
    session.redo([4])
    session.redo([2])
    assert all(distance(a, b) < 1e-8 for a, b in zip(deltas(session), before, strict=True))
    session.undo([1, 2, 3, 4])
    assert all(float(delta.norm()) < 1e-9 for delta in deltas(session))


@every_row
def test_settings_are_told_and_tell_methods_apart(row: str) -> None:
    sessions = {name: open_session(editor_of(name)) for name in {row, "d4s", "memit_seq"}}
    told = {name: json.dumps(session.editor.settings(), sort_keys=True) for name, session in sessions.items()}
    assert len(set(told.values())) == len(told)


@every_row
def test_what_a_method_is_stands_in_its_class(row: str) -> None:
    kind, _ = ROWS[row]
    about = kind.about
    assert "arXiv" in about.paper
    assert all((about.title, about.cost, about.state, about.lacks))
    assert "arXiv" in (kind.__doc__ or "")
    if about.batch:
        make(open_session(editor_of(row)), REQUESTS[:4], batch=2)
    else:
        with pytest.raises(ArgumentError, match=r"one edit at a time.*batch_size to 1"):
            make(open_session(editor_of(row)), REQUESTS[:4], batch=2)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: ROME(layers=[1, 2]), "one layer"),
        (lambda: EMMET(slack=-1.0), "slack"),
        (lambda: AlphaEdit(weight=0.0), "weight"),
        (lambda: AlphaEdit(explained=1.0), "explained"),
        (lambda: AlphaEdit(threshold=0.0), "threshold"),
        (lambda: MEMITSeq(frobenius=-1.0), "frobenius"),
        (lambda: MEMIT(residual="half"), "residual"),  # type: ignore[arg-type]
        (lambda: TargetSettings(anchor="head"), "anchor"),  # type: ignore[arg-type]
        (lambda: TargetSettings(first_choice=-1), "first_choice"),
        (lambda: RidgeSolver(torch.eye(2), 1, slack=0.5), "memory"),
        (lambda: RidgeSolver(torch.eye(2), 1, memory=False, slack=-0.5), "slack"),
        (lambda: SubspaceSolver(torch.eye(2), 0.0, 1), "weight"),
        (lambda: SubspaceSolver(torch.empty(2, 0), 1.0, 1), "empty"),
    ],
)
def test_arguments_are_checked(make_it: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_another_subspace_is_refused() -> None:
    eye = torch.eye(4, dtype=F64)
    one, other = SubspaceSolver(eye[:, :2], 1.0, 3), SubspaceSolver(eye[:, 2:], 1.0, 3)
    one.absorb(one.preview(torch.ones(4, 1, dtype=F64), torch.ones(3, 1, dtype=F64)))
    with pytest.raises(ValueError, match="another one"):
        other.load_state_dict(one.state_dict())
    turned = SubspaceSolver(eye[:, [1, 0]], 1.0, 3)  # another basis of the same space, as another machine finds it
    turned.load_state_dict(one.state_dict())
    assert torch.equal(turned.delta, one.delta)
    assert turned.prior_checksum == one.prior_checksum


def test_first_choices_are_counted() -> None:
    request = replace(REQUESTS[0], target_new="C")  # nearly what this model says anyway
    problems = [build_problem(tiny_tokenizer(), request, (("{}",),))]
    stops: list[dict[str, Any]] = [{"margin": 1e-9}, {"first_choice": 1}, {"first_choice": 2}]
    settings = [TargetSettings(60, lr=0.05, loss_threshold=0, **stop) for stop in stops]
    adapter = ModelAdapter(tiny_model("gpt2", F64))
    steps = [len(optimise_targets(adapter, problems, LAYER, own)[0].trace) for own in settings]
    assert 1 < steps[0] < 60
    assert steps[1:] == [steps[0], steps[0] + 1]


# ---- PMET ------------------------------------------------------------------------------------------------------------


def test_pmet_spreads_the_residual_of_the_mlp_by_square_roots() -> None:
    target = TargetSettings(steps=4, moved="modules")
    editor = PMET(layers=[1, 2], covariance_weight=5.0, contexts=[["{}"]], target=target)
    session = make(open_session(editor), REQUESTS[:2])
    model = tiny_model("gpt2", F64)
    blocks: Any = model.transformer.h
    before = {layer: blocks[layer].mlp.c_proj.weight.data.clone() for layer in (1, 2)}
    for request in REQUESTS[:2]:
        problem = build_problem(tiny_tokenizer(), request, (("{}",),))
        (fitted,) = optimise_targets(ModelAdapter(model), [problem], 2, target)
        prompt = problem.prompts[0]

        def look(layer: int, ids: Any = prompt.ids[: prompt.lookup + 1]) -> tuple[Tensor, Tensor]:
            seen: list[tuple[Tensor, Tensor]] = []
            module = blocks[layer].mlp.c_proj
            handle = module.register_forward_hook(lambda _, i, o, seen=seen: seen.append((i[0][0, -1], o[0, -1])))
            model(torch.tensor([ids]))
            handle.remove()
            return seen[0]

        for layer, share in ((1, 2**0.5), (2, 1.0)):
            key = look(layer)[0]
            residual = (fitted.value - look(2)[1]) / share
            system = 5 * moment_of(layer, len(key)) + torch.outer(key, key)
            blocks[layer].mlp.c_proj.weight.data += torch.outer(residual, torch.linalg.solve(system, key)).T
    for layer, delta in zip((1, 2), deltas(session), strict=True):
        assert distance(delta, (blocks[layer].mlp.c_proj.weight.data - before[layer]).T) < 1e-9


def test_what_is_moved_must_fit_the_method() -> None:
    with pytest.raises(ValueError, match=r"target.moved must be 'modules' for PMET"):
        PMET(target=TARGET)
    with pytest.raises(ValueError, match=r"target.moved must be 'state' for MEMIT"):
        MEMIT(target=TargetSettings(moved="modules"))
    with pytest.raises(ValueError, match="norm_anchor"):
        PMET(norm_anchor=NormAnchor())
    with pytest.raises(ValueError, match="moved"):
        TargetSettings(moved="head")  # type: ignore[arg-type]


# ---- NSE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_nse_is_its_textbook_formula_pass_by_pass(batch: int) -> None:
    editor = NSE(layers=[LAYER], covariance_weight=5.0, neurons=0.7, passes=2, lower=0.0, **ENGINE)
    found = make(open_session(editor), REQUESTS, batch)
    book, original = Textbook(TARGET), Textbook(TARGET)
    for past in range(0, len(REQUESTS), batch):
        step = REQUESTS[past : past + batch]
        keys, plain, shifts = original.facts(step)  # targets of the original model
        problems = [build_problem(tiny_tokenizer(), request, (("{}",),)) for request in step]

        def reached(model: Any, problems: Any = problems) -> Tensor:
            columns = []
            for problem in problems:
                out: list[Tensor] = []
                block = model.transformer.h[LAYER]
                handle = block.register_forward_hook(lambda _, inputs, output, out=out: out.append(output[0]))
                model(torch.tensor([problem.prompts[0].ids[: problem.prompts[0].lookup + 1]]))
                handle.remove()
                columns.append(out[0].reshape(-1, out[0].shape[-1])[-1])
            return torch.stack(columns, 1)

        wanted = reached(original.model) + shifts
        for _ in range(2):
            book.module.weight.data += nse(book, keys, plain, wanted - reached(book.model)).T
        book.past = torch.cat([book.past, keys], 1)
    assert distance(deltas(found)[0], book.weight - book.base) < 1e-9


@pytest.mark.parametrize("row", ["nse", "alphaedit", "rome", "1-li"])
def test_the_model_may_be_moved_between_two_edits(row: str) -> None:
    session = make(open_session(editor_of(row), dtype=torch.float32), REQUESTS[:1])
    session.ledger.adapter.model.to(torch.bfloat16)
    session.ledger.align()
    make(session, REQUESTS[1:2])
    assert len(session.ledger) == 2


def test_nse_writes_again_only_what_is_within_bounds() -> None:
    def passes(**settings: Any) -> Tensor:
        session = make(open_session(NSE(layers=[LAYER], neurons=0.5, passes=4, **settings, **ENGINE)), REQUESTS[:3], 3)
        gains = session.ledger.facts_of([1])[0].tensors[f"gains.{LAYER}"]
        return (gains.norm(dim=0) > 0).sum(1)

    assert passes(lower=0.0).tolist() == [4, 4, 4]
    assert passes(lower=1e6, upper=1e7).tolist() == [1, 1, 1]
    assert passes(lower=0.0, upper=1e-9).tolist() == [1, 1, 1]
    session = make(open_session(NSE(layers=[LAYER], neurons=0.5, passes=1, **ENGINE)), REQUESTS[:3], 3)
    record = session.ledger.facts_of([1])[0].tensors
    assert record[f"gains.{LAYER}"].shape[2] == 1


def test_all_neurons_in_one_pass_are_memit_with_memory_and_targets_of_the_original_model() -> None:
    editor = NSE(layers=[1], covariance_weight=5.0, neurons=1.0, passes=1, **ENGINE)
    (one,) = deltas(make(open_session(editor), REQUESTS[:1]))
    (other,) = deltas(make(open_session(editor_of("memit_seq", layers=[1])), REQUESTS[:1]))
    assert distance(one, other) < 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"neurons": 0.0}, "neurons"), ({"passes": 0}, "passes"), ({"lower": 2.0, "upper": 1.0}, "lower")],
)
def test_nse_checks_its_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSE(**settings)
