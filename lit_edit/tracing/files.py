"""What a tracing leaves in its folder: a journal that it goes on from, and tables of numbers."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_edit.errors import ArgumentError, UserError
from lit_edit.paths import sync_folder, without_nan, write_atomically, write_json
from lit_edit.tracing.prompts import role_of
from lit_edit.tracing.summary import AverageEffect, fraction_restored
from lit_edit.tracing.trace import FactTrace


class TraceFolder:
    """The folder of a tracing.

    ``facts.jsonl`` holds one finished fact per line and is the truth; tables and figures are made of it.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "facts.jsonl"

    def open(self, settings: Mapping[str, Any]) -> dict[str, FactTrace]:
        """Begin here, or go on: return the facts that are finished, by id.

        Args:
            settings: All that decides about the numbers, as primitives.

        Raises:
            ArgumentError: If the folder holds a tracing with other settings.
            UserError: If its files are damaged.
        """
        file = self.path / "settings.json"
        if not file.exists():
            if self.journal.exists():
                raise UserError(f"{self.path} holds facts but no settings.json; choose another --out")
            write_json(file, dict(settings))
            return {}
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            different = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); choose another --out") from None
        if different:
            pairs = "; ".join(f"{name} was {there.get(name)!r}, is {settings.get(name)!r}" for name in different)
            raise ArgumentError(
                f"{self.path} holds a tracing with other settings ({pairs}); give those, or choose another --out"
            )
        return {trace.id: trace for trace in self._read()}

    def _read(self) -> Iterator[FactTrace]:
        """Read the journal; a last line that was cut off is taken away."""
        if not self.journal.exists():
            return
        raw = self.journal.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.journal, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                yield FactTrace.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.journal}:{number}: damaged ({type(error).__name__}: {error}); take the line out, and its "
                    "fact is traced again"
                ) from None

    def append(self, trace: FactTrace) -> None:
        """Put a finished fact on record; it is on disk when this returns."""
        line = json.dumps(trace.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"
        with self.journal.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path)

    def write_tables(self, traces: Sequence[FactTrace], averages: Sequence[AverageEffect]) -> list[str]:
        """Write ``effects``, ``average`` and ``fraction_restored`` as CSV, and Parquet where pyarrow is installed.

        Returns:
            The files' names.
        """
        tables = {
            "effects": list(effect_rows(traces)),
            "average": [dict(vars(average)) for average in averages],
            "fraction_restored": list(fraction_rows(traces)),
        }
        names = []
        for name, rows in tables.items():
            write_atomically(self.path / f"{name}.csv", partial(Path.write_text, data=_as_csv(rows), encoding="utf-8"))
            names.append(f"{name}.csv")
        try:
            pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        except ImportError:
            return names
        for name, rows in tables.items():
            table = pyarrow.Table.from_pylist(without_nan(rows))
            write_atomically(self.path / f"{name}.parquet", partial(parquet.write_table, table))
            names.append(f"{name}.parquet")
        return names


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


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(without_nan(list(rows)))
    return text.getvalue()
