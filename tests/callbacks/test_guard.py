"""The guard: it sees harm, says which edit did it, and stops or takes it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lit_edit.callbacks import HarmError, HarmGuard
from lit_edit.callbacks.guard import Health

from lit_edit import EditStream
from lit_edit.editors.base import Proposal
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.editors.closed_form.facts import Facts
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import EditRefusedError
from tests.streams import make_data, make_stream, make_trainer

HARM = 2  # the place of the harmful edit in the stream


class Harmful(D4S):
    """D4S that writes one edit with a residual many times too large."""

    factor = 3e3

    def _find(self, rows: Any, names: Any, targets: Any, shifts: Any, *rest: Any) -> Facts:
        here = any(name.startswith(f"{HARM}\x1f") for name in names)
        return super()._find(rows, names, targets, shifts * self.factor if here else shifts, *rest)


class NearlyZeroDenominator(D4S):
    """One edit as ROME makes it where ``k_plain^T C^-1 k`` nearly vanishes: the residual divided by next to nothing."""

    denominator = 1e-6

    def _find(self, rows: Any, names: Any, targets: Any, shifts: Any, *rest: Any) -> Facts:
        here = any(name.startswith(f"{HARM}\x1f") for name in names)
        return super()._find(rows, names, targets, shifts / self.denominator if here else shifts, *rest)


def harmful(kind: type[D4S] = Harmful, **options: Any) -> EditStream:
    base = make_stream(residual="shared")
    settings = {"layers": [1, 2], "covariance_weight": 5.0, "residual": "shared", "target": base.editor.target}
    return EditStream(base.language_model, kind(**settings), base.statistics, **options)


def fit(folder: Path, stream: EditStream, **guard: Any) -> HarmGuard:
    watch = HarmGuard(**{"every": 2, "min_agreement": 0, "max_growth": 0, **guard})
    make_trainer(folder, [watch]).fit(stream, make_data())
    return watch


def test_a_sound_stream_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = make_stream()
    guard = fit(tmp_path, stream, on_harm="stop", max_perplexity=50, max_growth=3)
    assert guard.history == []
    assert len(stream.ledger) == 6
    assert "harm" not in caplog.text


@pytest.mark.parametrize("kind", [Harmful, NearlyZeroDenominator])
@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_the_harmful_edit_is_taken_back_and_the_stream_goes_on(
    tmp_path: Path, kind: type[D4S], every: int, caplog: pytest.LogCaptureFixture
) -> None:
    stream = harmful(kind)
    guard = fit(tmp_path, stream, on_harm="undo", every=every, max_growth=2)
    assert [entry.id for entry in stream.ledger.entries] == ["0", "1", "3", "4", "5"]
    assert [event["edit"] for event in guard.history] == [HARM + 1]
    assert "taken back" in stream.ledger.history.undone[HARM + 1]
    assert "Edit 3 ('Serena Williams plays the sport of' -> 'chess') did it. It is taken back" in caplog.text
    (record,) = [record for record in stream.ledger.journal.records if record["kind"] == "undo"]
    assert record["origin"] == "guard"
    assert torch.isfinite(stream.adapter.own_weight(1)).all()
    assert stream.finish()["undone"] == 1


def test_it_stops_and_names_the_edit(tmp_path: Path) -> None:
    stream = harmful(journal=str(tmp_path / "x" / "ledger" / "journal"))
    with pytest.raises(HarmError, match=r"(?s)Edit 3 \('Serena.*did it.*lit-edit undo --run .*/x --edit 3"):
        fit(tmp_path, stream, on_harm="stop", max_growth=2)
    assert len(stream.ledger) == 4


def test_an_editor_that_takes_nothing_out_is_guarded_all_the_same(tmp_path: Path) -> None:
    class OneWay(Harmful):
        def retract(self, *args: Any, **kwargs: Any) -> Proposal:
            raise ArgumentError("OneWay cannot take edits out")

    with pytest.raises(HarmError, match=r"cannot be found out: OneWay cannot take edits out"):
        fit(tmp_path, harmful(OneWay), on_harm="undo", max_growth=2)


def test_it_warns_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = harmful()
    guard = fit(tmp_path, stream, on_harm="warn", every=6, max_growth=2)
    assert len(stream.ledger) == 6
    assert guard.history[0]["edit"] == HARM + 1
    assert "harm:" in caplog.text


def test_without_the_guard_the_harm_stays(tmp_path: Path) -> None:
    """What the guard is for: nothing else would have stopped this."""
    stream = harmful()
    make_trainer(tmp_path).fit(stream, make_data())
    watch = HarmGuard(max_growth=2, min_agreement=0)
    assert watch.breach(watch.measure(stream)) is not None


def test_harm_that_no_single_edit_did_stops(tmp_path: Path) -> None:
    stream = make_stream()
    make_trainer(tmp_path / "a").fit(stream, make_data(limit=2))
    watch = HarmGuard(max_perplexity=0, max_growth=1e-9, min_agreement=0, on_harm="undo")
    watch._good = 2  # the last look was behind them: their growth alone is past this bound
    with pytest.raises(HarmError, match="No single edit since the last look"):
        watch.look(stream)


def test_a_nan_key_never_gets_in(tmp_path: Path) -> None:
    class NaNKey(D4S):
        def _find(self, rows: Any, names: Any, *rest: Any) -> Facts:
            facts = super()._find(rows, names, *rest)
            if names[0].startswith(f"{HARM}\x1f"):
                rest[3].add(1, facts.keys[1] * torch.nan, facts.residuals[1])
            return facts

    stopped = harmful(NaNKey)
    with pytest.raises(EditRefusedError, match="NaN or infinite"):
        fit(tmp_path / "a", stopped)
    assert len(stopped.ledger) == HARM
    skipping = harmful(NaNKey, on_refused="skip")
    fit(tmp_path / "b", skipping)
    assert [entry.id for entry in skipping.ledger.entries] == ["0", "1", "3", "4", "5"]
    assert [name for name, _ in skipping.ledger.history.refused] == [str(HARM)]


def test_logits_that_are_not_finite_are_harm(tmp_path: Path) -> None:
    class Overflowing(EditStream):
        def apply_edit(self, proposal: Proposal) -> None:
            super().apply_edit(proposal)
            if proposal.requests[0].id == str(HARM):
                self.adapter.own_weight(1).fill_(torch.inf)

    base = make_stream()
    stream = Overflowing(base.language_model, base.editor, base.statistics)
    with pytest.raises(HarmError, match="not finite"):
        fit(tmp_path, stream, on_harm="stop", every=1)


@pytest.mark.parametrize(
    ("health", "bound", "told"),
    [
        (Health(float("inf"), 0.0, 1.0), {}, "not finite"),
        (Health(2.5, 0.0, 1.0), {"max_perplexity": 2}, "perplexity is 2.5 times"),
        (Health(1.0, 0.6, 1.0), {"max_growth": 0.5}, "grown by 60.0% (bound 50%)"),
        (Health(1.0, float("nan"), 1.0), {"max_growth": 0.5}, "grown by nan"),
        (Health(1.0, 0.0, 0.2), {"min_agreement": 0.3}, "only 20% of the neighbours"),
        (Health(1.9, 0.4, 0.4), {"max_perplexity": 2, "max_growth": 0.5, "min_agreement": 0.3}, None),
        (Health(100.0, 9.0, 0.0), {"max_perplexity": 0, "max_growth": 0, "min_agreement": 0}, None),
    ],
)
def test_each_bound(health: Health, bound: dict[str, float], told: str | None) -> None:
    breach = HarmGuard(**bound).breach(health)
    assert (breach is None) == (told is None)
    assert told is None or told in str(breach)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"on_harm": "pray"}, "on_harm must be"),
        ({"max_perplexity": 0.5}, "above 1"),
        ({"max_growth": -1}, "max_growth must not be negative"),
        ({"min_agreement": 1.5}, "a share"),
        ({"min_agreement": float("nan")}, "min_agreement must not be negative"),
    ],
)
def test_bad_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarmGuard(**options)


def test_a_guarded_run_that_is_cut_comes_to_the_same_end(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.stream.test_edit_stream import StopAfter
    from tests.streams import state_of

    whole = harmful()
    fit(tmp_path / "whole", whole, on_harm="undo", max_growth=2)
    folder = tmp_path / "cut"
    journal = str(folder / "ledger" / "journal")

    def callbacks() -> list[Any]:
        guard = HarmGuard(every=2, min_agreement=0, max_growth=2, on_harm="undo")
        return [guard, ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)]

    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(folder, [*callbacks(), StopAfter(4)]).fit(harmful(journal=journal), make_data())
    resumed = harmful(journal=journal)
    make_trainer(folder, callbacks()).fit(
        resumed, make_data(), ckpt_path=str(folder / "checkpoints" / "epoch=0-step=2.ckpt")
    )
    left, right = state_of(whole), state_of(resumed)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert resumed.ledger.history.undone == whole.ledger.history.undone
