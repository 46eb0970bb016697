"""The parts of the callbacks that need no Trainer."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_edit.callbacks import LayerNorms, Retention
from lit_edit.callbacks.base import as_stream, is_due
from lit_edit.callbacks.closing_table import layers_table, summary_table
from lit_edit.callbacks.figures import course_of
from rich.console import Console
from rich.table import Table

from lit_edit.ledger.history import EditHistory, LedgerEntry
from lit_edit.metrics.evaluation import EditResult, ProbeResult
from lit_edit.report.pictures import draw_course
from lit_edit.runs.files import edit_rows
from lit_edit.stream.edit_stream import EditStream

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_is_due_once_per_multiple_whatever_the_step(every: int, step: int) -> None:
    points = list(range(0, 61, step))
    due = [now for before, now in pairwise(points) if is_due(before, now, every)]
    expected = sorted({-(-multiple // step) * step for multiple in range(every, points[-1] + 1, every)})
    assert due == expected


@pytest.mark.parametrize("value", [0, -1])
def test_intervals_below_one_and_negative_samples_are_refused(value: int) -> None:
    for callback in (LayerNorms, Retention):
        with pytest.raises(ValueError, match=f"every must be at least 1, got {value}"):
            callback(every=value)
    with pytest.raises(ValueError, match="sample must not be negative"):
        Retention(sample=-1)


@pytest.mark.parametrize("module", [BoringModel(), LightningModule()])
def test_only_edit_streams_are_followed(module: LightningModule) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"Retention follows an EditStream, got a {type(module).__name__}"
    ):
        as_stream(module, Retention())


def test_an_edit_stream_is_handed_back() -> None:
    stream = EditStream("some/model")
    assert as_stream(stream, Retention()) is stream


@pytest.mark.parametrize("kind", [LayerNorms, Retention])
def test_the_history_survives_a_checkpoint(kind: Any) -> None:
    first, second = kind(), kind()
    first.history.append({"edits": 3})
    state = first.state_dict()
    second.load_state_dict(state)
    second.history.append({"edits": 4})
    assert [point["edits"] for point in second.history] == [3, 4]
    assert [point["edits"] for point in first.history] == [3]


def metrics(value: float | None, perplexity: float | None = 20.0) -> dict[str, Any]:
    names = ("success", "magnitude", "accuracy", "token_accuracy")
    kinds: dict[str, Any] = {kind: dict.fromkeys(names, value) for kind in ("efficacy", "generalization", "locality")}
    kinds["locality"]["agreement"] = value
    return {**kinds, "score": value, "perplexity": perplexity}


def norms(edits: int) -> dict[str, Any]:
    change = 0.001 * edits
    values = {
        "mean_abs_before": 0.1,
        "mean_abs_after": 0.1 + change,
        "mean_abs_delta": change,
        "relative_change": change,
    }
    return {"edits": edits, "layers": {NAME: values}}


def result(number: int, nll: float) -> EditResult:
    return EditResult(str(number), (ProbeResult(nll, 2.0, (True,), (1,)),), (), ())


def rows_of(stream: Any) -> list[dict[str, Any]]:
    return edit_rows(stream.ledger.history, stream.results)


def recorded(edits: int, value: float | None = 0.75, immediate: bool = True) -> Any:
    """What the figures ask of a finished stream."""
    entries = [LedgerEntry(str(i), "s", "p", "t", {"target_probability": 0.5}) for i in range(edits)]
    results = {
        "base": {str(i): result(i, 3.0) for i in range(edits)},
        "immediate": {str(i): result(i, 0.1) for i in range(edits)} if immediate else {},
        "final": {str(i): result(i, 0.2 * i) for i in range(edits)},
    }

    class Ledger(SimpleNamespace):
        def __len__(self) -> int:
            return edits

    ledger = Ledger(entries=entries, history=EditHistory.listing(entries))
    summaries = {"base": metrics(0.1, 20.0), "final": metrics(value, 22.0)}
    return SimpleNamespace(
        ledger=ledger,
        results=results,
        committed_requests=lambda: list(range(edits)),
        edit_number=edits,
        summary_of=lambda stage, done: summaries[stage],
    )


def lines(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axis in figure.axes
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def test_metrics_run_from_the_base_over_the_history_to_the_end() -> None:
    retention = [{"edits": n, "summary": metrics(n / 10)} for n in (2, 4)]
    drawn = lines(draw_course(course_of(recorded(5), retention, []))["metrics"])
    assert drawn["efficacy accuracy"] == ([0, 2, 4, 5], [0.1, 0.2, 0.4, 0.75])
    assert set(drawn) == {"efficacy accuracy", "generalization success", "locality agreement"}
    ends = lines(draw_course(course_of(recorded(4), retention, []))["metrics"])
    assert ends["efficacy accuracy"][0] == [0, 2, 4]  # the last measurement is not drawn twice


def test_perplexity_is_drawn_from_zero_and_left_out_where_unknown() -> None:
    figure = draw_course(course_of(recorded(3), [{"edits": 1, "summary": metrics(0.5, None)}], []))["metrics"]
    axis = figure.axes[1]
    assert list(axis.get_lines()[0].get_xdata()) == [0, 3]
    assert axis.get_ylim()[0] == 0


def test_forgetting_is_drawn_by_age() -> None:
    (axis,) = draw_course(course_of(recorded(3), [], []))["forgetting"].axes
    immediate, final = (collection.get_offsets().tolist() for collection in axis.collections)
    assert [x for x, _ in final] == [2, 1, 0]
    assert [y for _, y in final] == pytest.approx([1.0, math.exp(-0.2), math.exp(-0.4)])
    assert [y for _, y in immediate] == pytest.approx([math.exp(-0.1)] * 3)


def test_norms_are_drawn_as_growth_in_percent() -> None:
    figure = draw_course(course_of(recorded(3), [], [norms(n) for n in range(4)]))["l1_norms"]
    growth, change = (axis.get_lines()[0] for axis in figure.axes)
    assert list(growth.get_ydata()) == pytest.approx([0, 1, 2, 3])
    assert list(change.get_ydata()) == pytest.approx([0, 0.001, 0.002, 0.003])
    assert growth.get_label() == NAME.removesuffix(".weight")


@pytest.mark.parametrize("stream", [recorded(1), recorded(2, None), recorded(2, immediate=False)])
def test_figures_are_drawn_whatever_is_missing(tmp_path: Path, stream: Any) -> None:
    figures = draw_course(course_of(stream, [], []))
    assert set(figures) == {"metrics", "forgetting"}
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_display_and_no_global_state_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.delenv("DISPLAY", raising=False)
    figures = draw_course(course_of(recorded(2), [], [norms(0), norms(1)]))
    assert plt.get_fignums() == []
    assert all(figure.canvas.manager is None for figure in figures.values())


def rendered(table: Table) -> list[str]:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text().splitlines()


def row(text: list[str], name: str) -> list[str]:
    (line,) = [line for line in text if name in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def closing(**changes: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {"edits": 3, "base": metrics(0.25, 20.0), "immediate": metrics(1.0, None)}
    return {
        **summary,
        "final": metrics(0.5, 25.0),
        "seconds": {"per_edit": 1.234},
        "layers": norms(3)["layers"],
        **changes,
    }


def test_the_closing_table_shows_every_stage() -> None:
    text = rendered(summary_table(closing()))
    assert "3 edits" in text[0]
    assert row(text, "efficacy accuracy") == ["efficacy accuracy", "0.250", "1.000", "0.500"]
    assert row(text, "locality agreement")[1:] == ["0.250", "1.000", "0.500"]
    assert row(text, "perplexity") == ["perplexity", "20.0", "", "25.0 (+25.0%)"]
    assert row(text, "seconds per edit")[3] == "1.23"


def test_what_was_not_measured_is_a_dash() -> None:
    text = rendered(summary_table(closing(immediate=metrics(None, None), base=metrics(None, None))))
    assert row(text, "score")[1:] == ["0.500"]  # columns with no value are left out
    assert row(text, "perplexity")[1:] == ["25.0"]
    assert "before" not in " ".join(text)
    empty = {"success": None, "magnitude": None, "accuracy": None, "token_accuracy": None, "agreement": None}
    text = rendered(summary_table(closing(final={**metrics(0.5, None), "locality": empty}, base=metrics(0.5, None))))
    assert row(text, "locality agreement") == ["locality agreement", "0.500", "1.000", "–"]
    stages = {stage: {**metrics(0.5, None), "locality": empty} for stage in ("base", "immediate", "final")}
    text = rendered(summary_table(closing(**stages)))
    assert not [line for line in text if "locality" in line or "perplexity" in line]  # and rows
    assert row(text, "seconds per edit")[1:] == ["", "", "1.23"]


def test_the_layers_table_shows_growth() -> None:
    assert row(rendered(layers_table(closing())), NAME) == [NAME, "0.10000", "0.10300", "+3.00%", "0.00300"]


def test_edit_rows_join_ledger_and_results() -> None:
    rows = rows_of(recorded(2))
    assert [r["number"] for r in rows] == [1, 2]
    assert rows[1]["id"] == "1"
    assert (rows[1]["base_success"], rows[1]["final_success"], rows[1]["final_accuracy"]) == (False, True, True)
    assert rows[1]["final_target_nll"] == pytest.approx(0.2)
    assert "immediate_success" not in rows_of(recorded(1, immediate=False))[0]
