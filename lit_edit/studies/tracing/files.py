"""What a tracing leaves in its folder: a journal that it goes on from, and tables of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import Table, parquet

from lit_edit.files.paths import without_nan, write_atomically, write_text
from lit_edit.runs.results import ResultsFolder
from lit_edit.studies.tracing.prompts import role_of
from lit_edit.studies.tracing.summary import AverageEffect, fraction_restored
from lit_edit.studies.tracing.trace import FactTrace
from lit_edit.sweeps.outputs import as_csv


class TraceFolder(ResultsFolder[FactTrace]):
    """The folder of a tracing.

    ``facts.jsonl`` holds one finished fact per line and is the truth; tables and figures are made of it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, FactTrace.from_dict, "tracing", "facts.jsonl")

    def open(self, settings: Mapping[str, Any]) -> list[FactTrace]:
        """Begin here, or go on; pictures of a tracing whose settings are gone are not this one's."""
        if not (self.path / "settings.json").exists() and not self.results.exists():
            for picture in (self.path / "facts").glob("*.png"):
                picture.unlink()
        return super().open(settings)

    def write_tables(self, traces: Sequence[FactTrace], averages: Sequence[AverageEffect]) -> list[str]:
        """Write ``effects``, ``average`` and ``fraction_restored`` as CSV and Parquet; return the files' names."""
        tables = {
            "effects": list(effect_rows(traces)),
            "average": [dict(vars(average)) for average in averages],
            "fraction_restored": list(fraction_rows(traces)),
        }
        for name, rows in tables.items():
            rows = without_nan(rows)
            write_text(self.path / f"{name}.csv", as_csv(rows))
            write_atomically(self.path / f"{name}.parquet", partial(parquet.write_table, Table.from_pylist(rows)))
        return [f"{name}.{ending}" for ending in ("csv", "parquet") for name in tables]


def effect_rows(traces: Sequence[FactTrace]) -> Iterator[dict[str, Any]]:
    """Yield one row per fact, kind, layer and token from the subject on."""
    for trace in traces:
        first = trace.subject[0]
        for kind, layers in trace.restored.items():
            for layer, row in enumerate(layers):
                for position, p in enumerate(row, first):
                    yield {
                        "fact": trace.id,
                        "kind": kind,
                        "layer": layer,
                        "position": position,
                        "token": trace.tokens[position],
                        "role": role_of(position, trace.subject, len(trace.tokens)),
                        "answer": trace.answer,
                        "p_clean": trace.p_clean,
                        "p_corrupt": trace.p_corrupt,
                        "p_restored": p,
                        "effect": p - trace.p_corrupt,
                    }


def fraction_rows(traces: Sequence[FactTrace]) -> Iterator[dict[str, Any]]:
    """Yield one row per fact, kind and layer: the fraction restored at the best token."""
    for trace in traces:
        for kind in trace.restored:
            for layer, fraction in enumerate(fraction_restored(trace, kind)):
                yield {"fact": trace.id, "kind": kind, "layer": layer, "fraction_restored": fraction}
