"""``study tracing``: does causal tracing say at which layer an edit takes? Edits, a regression, a table, a figure."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.errors import ArgumentError
from lit_edit.studies.frame import as_cell, begin_study, results_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_edit.studies.localization.layer_edits import LayerEdit
    from lit_edit.studies.tracing.regression import LocalizationFit
    from lit_edit.studies.tracing.trace import FactTrace

LEAST_GAIN = 0.05
"""R² that tracing must add to the layers to be of use, with a p of at most 0.05."""


def _options(args: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "study tracing",
        "Whether causal tracing says where to edit (Hase et al. 2023): each traced fact is edited, alone, at each of "
        "some layers; how well that takes is explained by the layer, by what tracing says of that layer for that fact, "
        "and by both. What is done is not done again; what was cut goes on.",
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FOLDER", help="of a finished 'lit-edit trace'")
    parser.add_data("the facts that were traced, as given there", default="builtin")
    parser.add_method("method/rome")
    parser.add_layers("to edit at (default: about eight over the depth)")
    parser.add_argument("--width", type=positive, default=1, help="layers edited together, around each")
    parser.add_argument("--kind", default="mlp", choices=["hidden", "mlp", "attn"], help="of tracing effect")
    parser.add_limit("edit so many of the facts")
    parser.add_seed("of the new objects, and of the method")
    parser.add_out("folder to write to (default: runs/studies/tracing-NAME)")
    return parser.parse_args(args)


def run_tracing(args: list[str]) -> int:
    """Run the study; return the exit status."""
    options = _options(args)
    begin_study()

    from lit_edit.files.paths import without_nan, write_text
    from lit_edit.studies.tracing.facts import find_file, read_facts
    from lit_edit.studies.tracing.regression import regress
    from lit_edit.sweeps.outputs import as_csv, as_markdown, write_outputs

    told, traces = _read_trace(options.trace, options.kind)
    file = find_file(options.data)
    if told.get("data") != hashlib.sha256(file.read_bytes()).hexdigest()[:16]:
        raise ArgumentError(f"--data {options.data}: {options.trace} holds a tracing of other facts; give that file")
    place = {fact.id: number for number, fact in enumerate(read_facts(file))}
    traces.sort(key=lambda trace: place.get(trace.id, len(place)))  # several threads leave them in any order
    with results_folder(options.out, "studies", f"tracing-{options.trace.resolve().name}") as out:
        edits = _edit(options, out, told, traces, file)
    kept = [edit for edit in edits if edit.score is not None]
    if not kept:
        raise ArgumentError(f"{out}: none of the {len(edits)} edits could be made; try another --method, or --layers")
    by_layer = layer_rows(kept)
    text = f"{as_markdown([{k: as_cell(v) for k, v in row.items()} for row in by_layer])}\n"
    regression: dict[str, Any] = {}
    try:
        fit = regress([e.score or 0.0 for e in kept], [e.layer for e in kept], [e.effect for e in kept])
    except ValueError as error:  # where all edits take alike there is nothing to explain, and that is a result
        text += f"There is nothing to regress: {error}. More edits (--limit, --layers) may tell more.\n"
    else:
        text += f"{as_markdown([fit_row(fit)])}\n{verdict(fit)}\n"
        regression = {**vars(fit), "gain": fit.gain}
    left_out = len(edits) - len(kept)
    text += f"{left_out} edits could not be made and are left out.\n" if left_out else ""
    rows = [{**vars(edit), "score": edit.score} for edit in edits]
    write_text(out / "edits.csv", as_csv(rows))
    title = f"{told['model']}, {options.method}: {len({e.fact for e in kept})} facts at {len(by_layer)} layers"
    content = without_nan({**regression, "layers": by_layer})
    write_outputs(out, "tracing", text, figure=draw_study(kept, title), content=content)
    sys.stdout.write(f"{text}Everything is in {out}/ (tracing.md, edits.csv, tracing.json, tracing.png)\n")
    return 0


def _read_trace(folder: Path, kind: str) -> tuple[dict[str, Any], list[FactTrace]]:
    from lit_edit.studies.tracing.trace import FactTrace

    try:
        told = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        lines = (folder / "facts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        traces = [FactTrace.from_dict(json.loads(line)) for line in lines]
    except OSError as error:
        raise ArgumentError(
            f"--trace {folder}: no tracing there ({error.strerror}: {error.filename}); make one with lit-edit trace"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"--trace {folder}: damaged ({type(error).__name__}: {error})") from None
    if not traces or kind not in traces[0].restored:
        raise ArgumentError(f"--trace {folder}: holds no effects of --kind {kind}; trace with --kinds {kind}")
    return told, traces


def _edit(
    options: argparse.Namespace, out: Path, told: Mapping[str, Any], traces: Sequence[FactTrace], file: Path
) -> list[LayerEdit]:
    """Make the edits that are not on record; return all, by layer and fact."""
    from tqdm import tqdm

    from lit_edit.models import ModelAdapter
    from lit_edit.runs.results import ResultsFolder
    from lit_edit.stats.second_moment import weights_hash
    from lit_edit.studies.alone import SingleEdits
    from lit_edit.studies.layers.candidates import automatic_stride
    from lit_edit.studies.layers.key_statistics import StatisticsOfAll
    from lit_edit.studies.layers.method import Method
    from lit_edit.studies.localization.layer_edits import LayerEdit, edit_alone, probability, requests_of
    from lit_edit.studies.tracing.summary import fraction_restored
    from lit_edit.studies.tracing.trace import window_around

    effects = {trace.id: fraction_restored(trace, options.kind) for trace in traces if trace.p_clean != trace.p_corrupt}
    requests = requests_of(file, list(effects), options.seed)[: options.limit]
    method = Method(options.method, told["model"], options.seed)
    model, tokenizer = method.stream.language_model.load()
    adapter, base_hash = ModelAdapter(model), weights_hash(model)
    if told.get("weights") != base_hash:
        raise ArgumentError(f"{told['model']} has other weights now than when {options.trace} was made; trace again")
    layers = sorted(set(options.layers or range(0, adapter.n_layers, automatic_stride(adapter.n_layers))))
    for layer in layers:
        adapter.check_layer(layer)
    settings = {
        **{name: told[name] for name in ("model", "weights", "data")},
        **{name: getattr(options, name) for name in ("kind", "width", "seed")},
        **method.settings(),
    }
    folder = ResultsFolder(out, lambda row: LayerEdit(**row), "study")
    done = {(edit.layer, edit.fact): edit for edit in folder.open(settings)}
    groups = {layer: range(*window_around(layer, options.width, adapter.n_layers)) for layer in layers}
    every = sorted({number for group in groups.values() for number in group})
    statistics = StatisticsOfAll.like(method.stream.statistics, every)
    missing = {layer: [r for r in requests if (layer, r.id) not in done] for layer in layers}
    with tqdm(desc="edits", unit="edit", total=sum(map(len, missing.values()))) as bar:
        before = {r.id: probability(adapter, tokenizer, r) for r in requests if any(missing.values())}
        for layer in (layer for layer in layers if missing[layer]):
            bar.set_description_str(f"edits at layer {layer}")
            single = SingleEdits(method.make(groups[layer]), adapter, tokenizer, statistics)
            for request, after in edit_alone(single, missing[layer]):
                edit = LayerEdit(request.id, layer, effects[request.id][layer], before[request.id], after)
                folder.append(vars(edit))
                done[layer, request.id] = edit
                bar.update()
    return [done[layer, request.id] for layer in layers for request in requests]


def layer_rows(edits: Sequence[LayerEdit]) -> list[dict[str, Any]]:
    """Return, per layer, the mean rewrite score and the mean tracing effect."""
    by_layer = {layer: [edit for edit in edits if edit.layer == layer] for layer in sorted({e.layer for e in edits})}
    return [
        {
            "layer": layer,
            "facts": len(of),
            "rewrite score": sum(edit.score or 0.0 for edit in of) / len(of),
            "fraction restored": sum(edit.effect for edit in of) / len(of),
        }
        for layer, of in by_layer.items()
    ]


def fit_row(fit: LocalizationFit) -> dict[str, str]:
    """Return the regressions as a row of a table."""
    shares = {"R² layer": fit.layer, "R² tracing": fit.effect, "R² both": fit.both, "gain": fit.gain}
    return {name: as_cell(share) for name, share in shares.items()} | {
        "F": f"{fit.statistic:.2f}",
        "p": f"{fit.p_value:.3g}",
    }


def verdict(fit: LocalizationFit) -> str:
    """Say which to trust on this model."""
    if fit.gain >= LEAST_GAIN and fit.p_value <= 0.05:
        return (
            f"Tracing explains {fit.gain:.3f} of the variance beyond the layer (p {fit.p_value:.2g}): for this model "
            "and method it says something about where an edit takes."
        )
    return (
        f"Tracing adds {fit.gain:.3f} to the R² of the layer (p {fit.p_value:.2g}): that is not enough to choose by. "
        "Trust measured edits: lit-edit choose-layers."
    )


def draw_study(edits: Sequence[LayerEdit], title: str = "") -> Figure:
    """Draw rewrite scores against tracing effects, a point per edit, and the means of both by layer."""
    from lit_edit.files.pictures import COLOURS, MARKERS, add_panel, new_figure

    figure = new_figure(11.5, 4.6, title)
    left: Any = add_panel(figure, (1, 2, 1), "A fact edited at a layer", x_label="fraction restored (tracing)")
    right = add_panel(figure, (1, 2, 2), "Means by layer", x_label="layer", whole=True)
    points = left.scatter(
        [e.effect for e in edits], [e.score for e in edits], c=[e.layer for e in edits], cmap="viridis", s=22
    )
    figure.colorbar(points, ax=left, label="layer")
    left.set_ylabel("rewrite score (edit)")
    rows = layer_rows(edits)
    for name, colour, marker in zip(("rewrite score", "fraction restored"), COLOURS, MARKERS, strict=False):
        right.plot([r["layer"] for r in rows], [r[name] for r in rows], color=colour, marker=marker, label=name)
    right.legend(frameon=False)
    return figure
