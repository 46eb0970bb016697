"""Trees of tensors and plain values as one safetensors file, whole or not at all, and nothing in it that could run.

Such a file is a checkpoint. A tree is dictionaries, lists and tuples in one another, with tensors, text and numbers at
the ends. The tensors are stored as such; the tree around them is JSON in the metadata of the file. There lists, text,
numbers, ``true``, ``false`` and ``null`` stand for themselves, and an object with one key for what JSON does not have::

    {"dict": [[key, value], ...]}       keys need not be text
    {"tuple": [...]}
    {"tensor": name}
    {"tensor": [name, [1, 0]]}          stored with its dimensions in the order of memory: here transposed
    {"bytes": name}                     stored as a tensor
    {"float": "7ff8000000000000"}       NaN and the infinities
    {"int": "-8000000000000000"}        beyond 64 bits
    {"text": "7aCA"}                    not UTF-8: names of files can be so

The name of a tensor ends in a digest of its bits, and the metadata holds one of the tree: what a disk has changed is
found where it is read. Files of version 1 have no digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
from bisect import bisect
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_edit.errors import UserError
from lit_edit.files.checksum import digest_of
from lit_edit.files.paths import write_atomically
from lit_edit.files.tensor_files import save_tensors

_FORMAT = {"format": "lit-edit-checkpoint", "version": "2"}
_VERSIONS = ("1", "2")
_NAME = re.compile(r"\d+:(.*)#([0-9a-f]{16})", re.DOTALL)  # of a tensor: its place, and its digest
_MAX_DEPTH = 100
_MAX_TEXT = 1 << 24  # characters; safetensors refuses a header of 100 MB, which a long stream would reach
_INT64 = 1 << 63
_DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    }
)

Place = tuple[Any, ...]
"""The keys that lead to a value, outermost first."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read; the message says why."""


def save_tree(tree: Any, path: str | Path) -> None:
    """Write a tree, in one step.

    Tensors are written from where they are; copied are only those that lie scattered in memory, overlap others, or are
    on another device. What is one tensor twice stays one. Subclasses are stored as what they derive from: parameters as
    tensors, ``OrderedDict`` as a dictionary, paths and enumerations of text as text.

    Args:
        tree: Dictionaries (keys: text, numbers, ``None``, tuples of these), lists and tuples of dense tensors, text,
            bytes, numbers, booleans and ``None``.
        path: Where to; an old file stays if anything fails.

    Raises:
        TypeError: If the tree holds anything else; the message names the place.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree({"step": 3, ("a", 1): [torch.ones(2), float("inf")]}, Path(folder) / "x.ckpt")
        ...     load_tree(Path(folder) / "x.ckpt")
        {'step': 3, ('a', 1): [tensor([1., 1.]), inf]}
    """
    writer = _Writer()
    text = json.dumps(writer.node(tree), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    tensors, metadata = writer.tensors, {**_FORMAT, "digest": _digest(text.encode())}
    if len(text) <= _MAX_TEXT:
        metadata["tree"] = text
    else:
        tensors["tree"] = _as_tensor(text.encode())
    write_atomically(Path(path), lambda target: save_tensors(tensors, target, metadata))


def load_tree(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what :func:`save_tree` has written; nothing in the file is executed.

    Args:
        path: The file.
        device: Where tensors go. With ``"meta"`` their values are not read at all: a cheap check of everything else.

    Raises:
        CheckpointError: If there is no such file, or it is damaged, or of another kind.
    """
    device = torch.device(device)
    try:
        with safe_open(path, "pt") as file:
            return _Reader(file, device).value(_description(file))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if _is_pickle(Path(path)):
            raise CheckpointError(
                f"{path}: written by an earlier version of lit-edit or by another program (torch.save). Such files can "
                "run code and are not read; make the edits again"
            ) from None
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of lit-edit ({reason})") from error


def check_tree(path: str | Path) -> None:
    """Read a tree and keep nothing: raises :class:`CheckpointError` if :func:`load_tree` would, at any tensor."""
    load_tree(path, "meta")
    with safe_open(path, "pt") as file:
        try:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                _checked(file, name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged ({error})") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ---- writing ----------------------------------------------------------------------------------------------------


class _Writer:
    """Describes a tree, and collects its tensors as safetensors wants them: in host memory, contiguous, apart."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, tuple[str, Tensor]] = {}  # holding the tensors, lest their addresses be used again
        self._spans: list[tuple[int, int]] = []  # of memory that is spoken for, in order

    def node(self, value: Any, place: Place = ()) -> Any:
        """Return the description of a value."""
        if _is_plain(value):
            return value
        if isinstance(value, (str, int, float, PurePath)):
            return _primitive(value)
        if len(place) > _MAX_DEPTH:
            raise TypeError(f"{_title(place[:3])}... contains itself, or is nested more than {_MAX_DEPTH} deep")
        if isinstance(value, list):
            return self._parts(value, place)
        if isinstance(value, dict):
            return {"dict": [[self._key(key, place), self.node(part, (*place, key))] for key, part in value.items()]}
        if type(value) in (tuple, torch.Size):  # those with names for their parts would lose them
            return {"tuple": self._parts(value, place)}
        if isinstance(value, bytes):
            return {"bytes": self._store(_as_tensor(value), place)}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, place)}
        raise TypeError(_refusal(value, place))

    def _parts(self, values: Sequence[Any], place: Place) -> Sequence[Any]:
        if all(map(_is_plain, values)):  # as most of the many results of a long stream: nothing to be made anew
            return values
        return [self.node(part, (*place, index)) for index, part in enumerate(values)]

    def _key(self, key: Any, place: Place) -> Any:
        if _is_plain(key):
            return key
        if not _is_key(key):
            raise TypeError(
                f"{_title(place)} has the key {key!r}, a {_kind(key)}: a checkpoint can hold text, numbers, None and "
                "tuples of these as keys"
            )
        return self.node(key, place)

    def _tensor(self, value: Tensor, place: Place) -> str | list[Any]:
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not plain or value.dtype not in _DTYPES or value.device.type == "meta":
            raise TypeError(_refusal(value, place))
        value, order = _in_order_of_memory(value.detach())
        name = self._store(value, place)
        return name if order == sorted(order) else [name, order]

    def _store(self, value: Tensor, place: Place) -> str:
        memory = (value.device, value.data_ptr(), value.shape, value.stride())
        key = (*memory, value.dtype, value.is_conj(), value.is_neg())
        if value.numel() == 0 or key not in self._known:
            held = self._apart(value.cpu().resolve_conj().resolve_neg().contiguous())
            name = f"{len(self.tensors)}:{_title(place)}#{digest_of(held)}"
            self._known[key] = name, value
            self.tensors[name] = held
        return self._known[key][0]

    def _apart(self, value: Tensor) -> Tensor:
        """Return the tensor, or a copy if part of it is also part of another: safetensors refuses that."""
        if value.numel() == 0:
            return torch.empty(value.shape, dtype=value.dtype)
        start, stop = value.data_ptr(), value.data_ptr() + value.nbytes
        index = bisect(self._spans, (start, stop))
        if (index and self._spans[index - 1][1] > start) or (index < len(self._spans) and self._spans[index][0] < stop):
            return value.clone()
        self._spans.insert(index, (start, stop))
        return value


def _is_plain(value: Any) -> bool:
    """Tell quickly whether JSON surely has a value; of one that is not plain it may still have it."""
    kind = type(value)
    if kind is float:
        return -math.inf < value < math.inf
    if kind is int:
        return -_INT64 <= value < _INT64
    return value.isascii() if kind is str else value is None or kind is bool


def _primitive(value: Any) -> Any:
    """Return the description of text or a number; exact, also where JSON lacks the value."""
    if isinstance(value, (str, PurePath)):
        text = str(value) if isinstance(value, PurePath) else str.__str__(value)  # enumerations answer with their name
        try:
            text.encode()
        except UnicodeEncodeError:
            return {"text": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()}
        return text
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    return int(value) if -_INT64 <= value < _INT64 else {"int": f"{int(value):x}"}


def _in_order_of_memory(value: Tensor) -> tuple[Tensor, list[int]]:
    """Return a view with the dimensions of a transposed tensor as they lie in memory, and which these are.

    It saves a copy, and the same order when loaded makes products round the same.
    """
    order = list(range(value.dim()))
    by_stride = sorted(order, key=value.stride, reverse=True)
    if not value.is_contiguous() and value.permute(by_stride).is_contiguous():
        return value.permute(by_stride), by_stride
    return value, order


def _as_tensor(value: bytes) -> Tensor:
    return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)


def _is_key(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_key, value))
    return value is None or isinstance(value, (str, int, float))


def _title(place: Place) -> str:
    """Return how the program would write a place.

    Example:
        >>> _title(("callbacks", 0))
        "checkpoint['callbacks'][0]"
    """
    return "checkpoint" + "".join(f"[{key!r}]" for key in place)


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _refusal(value: Any, place: Place) -> str:
    what = f"a {_kind(value)}"
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        what = f"a {layout} {_kind(value)} of {value.dtype} on {value.device}"
    return (
        f"{_title(place)} is {what}, which a checkpoint cannot hold. Keep it as dense tensors, numbers, text or bytes, "
        "or as dictionaries, lists or tuples of these"
    )


# ---- reading ----------------------------------------------------------------------------------------------------


class _Reader:
    """Makes a tree of its description, and raises ``ValueError`` for everything that no writer of ours has written."""

    def __init__(self, file: Any, device: torch.device) -> None:
        self._file, self._device = file, device
        self._loaded: dict[str, Tensor] = {}
        self._kinds: dict[str, Callable[[Any, int], Any]] = {
            "dict": self._dict,
            "tuple": lambda content, depth: tuple(self.value(_of(list, content), depth)),
            "tensor": self._tensor,
            "bytes": lambda content, _: _bytes(self._file, content),
            "float": lambda content, _: _float(_of(str, content)),
            "int": lambda content, _: int(_of(str, content), 16),
            "text": lambda content, _: base64.b64decode(_of(str, content)).decode("utf-8", "surrogatepass"),
        }

    def value(self, node: Any, depth: int = 0) -> Any:
        """Return what a node stands for."""
        if depth > _MAX_DEPTH + 1:  # one more for what stands at the ends
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        if isinstance(node, list):
            return [self.value(part, depth + 1) for part in node]
        if not isinstance(node, dict):
            return node
        kind = next(iter(node)) if len(node) == 1 else None
        if kind not in self._kinds:
            raise ValueError(f"unknown content {', '.join(node)[:40]!r}")
        return self._kinds[kind](node[kind], depth)

    def _dict(self, content: Any, depth: int) -> dict[Any, Any]:
        pairs = [(self.value(key, depth), self.value(part, depth + 1)) for key, part in map(_pair, _of(list, content))]
        if not all(_is_key(key) for key, _ in pairs):
            raise ValueError("a dictionary with something else than a key for a key")
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a dictionary with a key twice")
        return found

    def _tensor(self, content: Any, depth: int) -> Tensor:
        name, order = _pair(content) if isinstance(content, list) else (content, [])
        if _of(str, name) not in self._loaded:
            # Into memory of its own: the file may go, and products of unaligned matrices may round otherwise.
            read = _get if self._device.type == "meta" else _checked
            self._loaded[name] = read(self._file, name).to(self._device, copy=True)
        value = self._loaded[name]
        if not isinstance(content, list):
            return value
        if sorted(_of(int, dim) for dim in _of(list, order)) != list(range(value.dim())):
            raise ValueError("a tensor with dimensions that it does not have")
        return value.permute([order.index(dim) for dim in range(value.dim())])


def _description(file: Any) -> Any:
    """Return the JSON that describes the tree; :class:`ValueError` if there is none."""
    metadata = file.metadata() or {}
    if metadata.get("format") != _FORMAT["format"]:
        raise ValueError("a safetensors file of another kind")
    if metadata.get("version") not in _VERSIONS:
        raise ValueError(f"of version {metadata.get('version')!r}, this lit-edit reads {' and '.join(_VERSIONS)}")
    text = metadata["tree"] if "tree" in metadata else _bytes(file, "tree").decode()
    if metadata["version"] != "1" and metadata.get("digest") != _digest(text.encode()):
        raise ValueError("the description of its contents is not what was written: bits have changed")
    return json.loads(text, parse_constant=_no_constant)


def _get(file: Any, name: Any) -> Tensor:
    try:
        return file.get_tensor(_of(str, name))
    except RuntimeError as error:  # of torch, about sizes and places that do not fit together
        raise ValueError(f"{name} cannot be read: {error}") from error


def _checked(file: Any, name: Any) -> Tensor:
    """Return a tensor whose bits are those that were written; names in files of version 1 have no digest."""
    value = _get(file, name)
    named = _NAME.fullmatch(name)
    if named and named[2] != digest_of(value):
        raise ValueError(f"{named[1]} is not what was written: bits have changed")
    return value


def _bytes(file: Any, name: Any) -> bytes:
    value = _checked(file, name)
    if value.dtype is not torch.uint8:
        raise ValueError(f"{name} holds {value.dtype} where bytes should be")
    return value.numpy().tobytes()


def _float(digits: str) -> float:
    raw = bytes.fromhex(digits)
    if len(raw) != 8:
        raise ValueError(f"{len(raw)} bytes where the eight of a float should be")
    return struct.unpack(">d", raw)[0]


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {_kind(value)} where a {kind.__name__} should be")
    return value


def _pair(value: Any) -> list[Any]:
    if len(_of(list, value)) != 2:
        raise ValueError(f"{len(value)} values where two should be")
    return value


def _is_pickle(path: Path) -> bool:
    """Tell whether a file that cannot be read looks like one of torch.save: a zip, or a pickle as before torch 1.6."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    if head.startswith(b"PK\x03\x04"):
        return True
    # Safetensors begin with the length of their header in eight bytes, which can look like a pickle but for the zeros.
    return head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and any(head[5:])
