"""Reading an offline wandb run back, without wandb's service: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _FILE_HEADER, _RECORD_HEADER = 32768, 7, 7
_FULL, _LAST = 1, 4


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = _FILE_HEADER, b""
    while at + _RECORD_HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _RECORD_HEADER:  # too little left in the block for a header: it is padding
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += _RECORD_HEADER
        parts += data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(folder: Path) -> dict[str, Any]:
    """Return history rows, config, summary and the names of logged files of the one run in a folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run: dict[str, Any] = {"history": [], "config": {}, "files": []}
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run["history"].append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind in ("config", "run"):
            items = record.config.update if kind == "config" else record.run.config.update
            run["config"] |= {_name(item): json.loads(item.value_json) for item in items}
        elif kind == "files":
            run["files"] += [file.path for file in record.files.files]
    return run


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
