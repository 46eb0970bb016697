"""From raw records to requests: one file per published format, found by its being here.

A format is a file of this folder. Its docstring names the fields as published, and it says

* ``recognises(record) -> bool``: whether a record, a mapping, is of this format; only fields tell, never a file's name;
* ``read(record, number) -> list[EditRequest]``: the edits of a record, which is the ``number``-th of its file, or
  :class:`~lit_edit.data.request.DataError`; :mod:`lit_edit.data.fields` reads fields and says what is wrong with them;
* ``BEFORE``: names of formats, if any, that its records could be taken for: it is asked before these.

Nothing else has to know of it: ``data.source`` takes its file's name. A record that no format recognises is one of
lit-edit's own, :mod:`lit_edit.data.formats.facts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from lit_edit.data.request import DataError, EditRequest

OWN = "facts"


def _in_order() -> dict[str, ModuleType]:
    """Return the formats by name, each before those that would also take its records."""
    found = {module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)}
    sorter: TopologicalSorter[str] = TopologicalSorter({OWN: [name for name in found if name != OWN]})
    for name, module in found.items():
        for later in getattr(module, "BEFORE", ()):
            sorter.add(later, name)
    return {name: found[name] for name in sorter.static_order()}


_BY_NAME = _in_order()
FORMATS = ("auto", *_BY_NAME)


def read_record(record: object, number: int, form: str = "auto") -> list[EditRequest]:
    """Turn one raw record (of JSON, CSV or a hub data set) into the requests that it holds.

    Its place in the file serves as id where the record has none; ``auto`` of :data:`FORMATS` looks at the fields. A
    :class:`DataError` says what is missing, of the wrong kind, empty, or does not fit the rest.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"expected a record with fields, got {type(record).__name__}")
    if form == "auto":
        form = next(name for name, module in _BY_NAME.items() if module.recognises(record))
    if form not in _BY_NAME:
        raise DataError(f"unknown format {form!r}; expected one of {', '.join(FORMATS)}")
    requests: list[EditRequest] = _BY_NAME[form].read(record, number)
    return requests


def parse_record(record: object, number: int, form: str = "auto") -> EditRequest:
    """Turn a raw record of one edit into its request; :class:`DataError` if it is broken or holds several.

    Example:
        >>> parse_record({"prompt": "The capital of Italy is", "subject": "Italy", "target_new": "Vienna"}, 7).id
        'fact-7'
    """
    requests = read_record(record, number, form)
    if len(requests) != 1:
        raise DataError(f"expected a record of one edit, got {len(requests)} edits in it")
    return requests[0]
