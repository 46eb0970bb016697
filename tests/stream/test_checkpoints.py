"""Checkpoint files: whole or not there, what was put in comes out, and nothing in them runs."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import pickletools
import struct
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import lit_edit.files.tensor_files
import lit_edit.files.trees
from lit_edit.devices.host_memory import release_free_memory
from lit_edit.files.trees import CheckpointError, check_tree, load_tree, save_tree
from lit_edit.stream.checkpoint_io import AtomicCheckpointIO
from tests.streams import make_data, make_stream, make_trainer, state_of


def there_and_back(tree: Any, folder: Path, device: str = "cpu") -> Any:
    save_tree(tree, folder / "tree.ckpt")
    return load_tree(folder / "tree.ckpt", device)


def bits(value: Tensor) -> Tensor:
    return value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_same(left: Any, right: Any) -> None:
    """Same types, same order, same bits."""
    if isinstance(left, Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert torch.equal(bits(left), bits(right))
        return
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert_same(list(left), list(right))
        assert_same(list(left.values()), list(right.values()))
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, float):
        assert struct.pack("<d", left) == struct.pack("<d", right)
    else:
        assert left == right


# ---- what goes in comes out ---------------------------------------------------------------------------------------

VALUES = [
    {},
    [],
    (),
    None,
    "text",
    {"a": [1, -2, 1.5, True, False, None, 'ü\n"\\\x00😀'], "b": ({"c": ()}, [[]])},
    {1: "int", True + 1: "two", 0.5: "float", None: "none", ("a", (1, None)): "tuple", "": "empty"},
    {False: 0, 1.0: 1},
    [0, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 3**5000, -(16**5000)],
    [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.pi * 1e-300],
    [math.inf, -math.inf, math.nan, -math.nan, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\x7f")[0]],
    [b"", b"\x00\xff", b"PK\x03\x04", b"\x80\x04."],
    ["\ud800", "\ud83d\ude00", "a\udcff"],
    {"\udcff": 1, "__metadata__": 2, "tree": torch.ones(1), "dict": {"tensor": "x", "tuple": [1]}},
    {"tensor": "0:checkpoint"},
]


@pytest.mark.parametrize("tree", VALUES, ids=range(len(VALUES)))
def test_values_come_back_exactly(tmp_path: Path, tree: Any) -> None:
    assert_same(tree, there_and_back(tree, tmp_path))


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (0,), (5, 0), (3, 4, 2)], ids=str)
def test_tensors_of_all_types_and_shapes_come_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape) * 50).abs().to(dtype)
    loaded = there_and_back({"x": value, "y": [value.clone()]}, tmp_path)
    assert_same({"x": value, "y": [value]}, loaded)


def test_odd_numbers_in_tensors_keep_their_bits(tmp_path: Path) -> None:
    raw = torch.tensor([0x7FF8000000000001, -1, -(2**63), 0x7FF0000000000000, 1])
    assert_same(raw.view(torch.float64), there_and_back(raw.view(torch.float64), tmp_path))


BASE = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
CUBE = torch.randn(2, 3, 4)
LAYOUTS = {
    "transposed": BASE.T,
    "permuted": CUBE.permute(2, 0, 1),
    "of one row": BASE[:1].T,
    "columns": BASE[:, 1:4],
    "every other": BASE[::2, ::3],
    "expanded": torch.ones(3, 1).expand(3, 4),
    "expanded scalar": torch.tensor(2.0).expand(2, 2),
    "offset": BASE[1:3],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "negative view": torch.randn(3, dtype=torch.complex64).conj().imag,
    "column-major factor": torch.linalg.cholesky(torch.eye(4, dtype=torch.float64) * 2),
    "empty piece": BASE[2:2],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_however_they_lie_come_back(tmp_path: Path, name: str) -> None:
    value = LAYOUTS[name]
    loaded = there_and_back({"a": value, "b": value}, tmp_path)
    assert_same({"a": value, "b": value}, loaded)
    if name in ("transposed", "permuted", "channels last", "column-major factor"):
        assert loaded["a"].stride() == value.stride()  # products of matrices that lie otherwise may round otherwise


def test_a_transposed_tensor_is_written_as_it_lies(tmp_path: Path) -> None:
    save_tree([BASE.T], tmp_path / "x.ckpt")
    with safe_open(tmp_path / "x.ckpt", "pt") as file:
        (name,) = file.keys()
        assert torch.equal(file.get_tensor(name), BASE)


def test_tensors_that_share_memory_come_back(tmp_path: Path) -> None:
    tree = {
        "same": [BASE, BASE, BASE.view(4, 6)],
        "turned": BASE.T,
        "parts": [BASE[:2], BASE[2:], BASE[1:3], BASE.reshape(-1)[5:6], BASE[0, 0], BASE[:0]],
        "as whole numbers": BASE.view(torch.int64),
        "twice scattered": [BASE[:, :2], BASE[:, :2]],
    }
    loaded = there_and_back(tree, tmp_path)
    assert_same(tree, loaded)
    assert loaded["same"][0] is loaded["same"][1] is loaded["same"][2]
    loaded["same"][0][0, 1] = -1.0  # what was one stays one, what was a view is on its own
    assert loaded["turned"][1, 0] == -1.0
    assert loaded["parts"][0][0, 1] == 1.0


def test_one_tensor_twice_is_stored_once(tmp_path: Path) -> None:
    whole = torch.zeros(100_000)
    save_tree({"a": whole, "b": whole, "c": [whole.view(100, 1000).view(-1)], "d": bytes(400_000)}, tmp_path / "x.ckpt")
    assert 800_000 < (tmp_path / "x.ckpt").stat().st_size < 810_000


def test_halves_of_one_tensor_are_written_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Tensor] = {}

    def look(tensors: dict[str, Tensor], path: Path, metadata: Any) -> None:
        written.update(tensors)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(lit_edit.files.tensor_files, "save_file", look)
    whole = torch.randn(6, 4)
    save_tree([whole[3:], whole[:3], whole.T[:, 3:]], tmp_path / "x.ckpt")
    assert {value.data_ptr() for value in written.values()} == {whole.data_ptr(), whole[3:].data_ptr()}


def test_loaded_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    loaded = there_and_back({"a": torch.zeros(3), "b": torch.ones(5)}, tmp_path)
    assert loaded["a"].untyped_storage().nbytes() == 12
    os.truncate(tmp_path / "tree.ckpt", 0)
    assert loaded["b"].add_(1).tolist() == [2.0] * 5


def test_tensors_need_no_gradient_to_come_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(2, 2))
    loaded = there_and_back({"weight": weight, "product": weight @ weight}, tmp_path)
    assert type(loaded["weight"]) is Tensor
    assert not loaded["product"].requires_grad
    assert_same(weight.detach(), loaded["weight"])


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


def test_subclasses_become_what_they_derive_from(tmp_path: Path) -> None:
    tree = {
        Colour.RED: Colour.RED,
        "path": PurePosixPath("/a/b"),
        "odd path": Path("a\udcff"),
        "size": torch.ones(2, 3).shape,
        "level": Level.HIGH,
        "ordered": OrderedDict(b=1, a=2),
        "number": torch.ones(1, dtype=torch.float64).numpy()[0],
    }
    expected = {
        "red": "red",
        "path": "/a/b",
        "odd path": "a\udcff",
        "size": (2, 3),
        "level": 3,
        "ordered": {"b": 1, "a": 2},
        "number": 1.0,
    }
    assert_same(expected, there_and_back(tree, tmp_path))


def test_many_results_do_not_fit_into_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_edit.files.trees, "_MAX_TEXT", 50)
    tree = {"results": ["ü" * 40, 1.5, torch.ones(2), b"bytes"]}
    assert_same(tree, there_and_back(tree, tmp_path))
    with safe_open(tmp_path / "tree.ckpt", "pt") as file:
        assert "tree" in file.keys()  # noqa: SIM118 - not a mapping
        assert "tree" not in file.metadata()


KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
KEYS = KEYS | st.tuples(KEYS, KEYS)
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    st.text(st.characters(categories=["Cs", "L"])),
    st.builds(
        lambda order, sizes, dtype: (torch.rand(sizes[: len(order)]) * 9).to(dtype).permute(order),
        st.integers(0, 3).flatmap(lambda count: st.permutations(range(count))),
        st.lists(st.integers(0, 3), min_size=3, max_size=3),
        st.sampled_from(DTYPES),
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda part: st.lists(part) | st.lists(part).map(tuple) | st.dictionaries(KEYS, part),
    max_leaves=30,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_tree_comes_back(tmp_path: Path, tree: Any) -> None:
    assert_same(tree, there_and_back(tree, tmp_path))


def test_with_meta_the_values_of_tensors_are_not_read(tmp_path: Path) -> None:
    tree = {"a": torch.ones(3, 2).T, "b": b"xyz", "c": [1.5]}
    loaded = there_and_back(tree, tmp_path, "meta")
    assert loaded["a"].is_meta
    assert loaded["a"].shape == (2, 3)
    assert (loaded["b"], loaded["c"]) == (b"xyz", [1.5])


# ---- what cannot be saved -----------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"callbacks": {"X": object()}}, r"^checkpoint\['callbacks'\]\['X'\] is a object, .* Keep it as dense tensors"),
        ({"a": [1, {2: ({3},)}]}, r"^checkpoint\['a'\]\[1\]\[2\]\[0\] is a set"),
        (torch.ones(1).numpy(), r"^checkpoint is a numpy.ndarray"),
        ([1j], r"^checkpoint\[0\] is a complex"),
        ([bytearray(b"x")], r"^checkpoint\[0\] is a bytearray"),
        ({"a": Pair(1, 2)}, r"^checkpoint\['a'\] is a .*Pair"),
        ({"a": torch.float32}, r"^checkpoint\['a'\] is a torch.dtype"),
        ({"f": len}, r"^checkpoint\['f'\] is a builtin_function_or_method"),
        ({"s": torch.eye(2).to_sparse()}, r"^checkpoint\['s'\] is a sparse_coo torch.Tensor"),
        (
            {"m": torch.empty(2, device="meta")},
            r"^checkpoint\['m'\] is a strided torch.Tensor of torch.float32 on meta",
        ),
        ({"z": torch.ones(2, dtype=torch.complex128)}, r"^checkpoint\['z'\] is .* of torch.complex128"),
        (
            {"k": {PurePosixPath("x"): 1}},
            r"^checkpoint\['k'\] has the key PurePosixPath\('x'\), a pathlib.PurePosixPath",
        ),
        ({(1, b"x"): 1}, r"^checkpoint has the key \(1, b'x'\), a tuple"),
    ],
)
def test_anything_else_is_refused_with_its_place(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_tree(tree, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def nested(depth: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


def test_trees_have_a_bottom(tmp_path: Path) -> None:
    assert_same(nested(100), there_and_back(nested(100), tmp_path))
    circle: dict[str, Any] = {}
    circle["a"] = [circle]
    for tree in (nested(101), nested(5000), circle):
        with pytest.raises(TypeError, match=r"^checkpoint\[.*contains itself, or is nested more than 100 deep"):
            save_tree(tree, tmp_path / "x.ckpt")


# ---- what cannot be read ------------------------------------------------------------------------------------------


def forge(path: Path, tree: Any, **metadata: str) -> Path:
    """A file with any description of a tree, and the tensors "t" (2, 3), "b" (bytes) and "h" (half precision)."""
    tensors = {"t": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.uint8), "h": torch.ones(2, dtype=torch.bfloat16)}
    text = tree if isinstance(tree, str) else json.dumps(tree)
    save_file(tensors, path, {"format": "lit-edit-checkpoint", "version": "1", "tree": text, **metadata})
    return path


def test_the_forger_knows_the_format(tmp_path: Path) -> None:
    tree = {"dict": [["a", {"tensor": ["t", [1, 0]]}], [{"tuple": [1]}, {"bytes": "b"}]]}
    assert_same({"a": torch.ones(3, 2), (1,): bytes(4)}, load_tree(forge(tmp_path / "x.ckpt", tree)))


BAD_TREES: list[Any] = [
    *("", "{", "[1,]", "NaN", "[Infinity]", "[-Infinity]", "[" * 100_000, '{"tuple":' * 5000, "1" * 5000, "\\"),
    *({}, {"object": 1}, {"reduce": ["os.system", "true"]}, {"tuple": [], "dict": []}, {"py/object": "os.system"}),
    *({"dict": {}}, {"dict": None}, {"dict": [1]}, {"dict": [["a"]]}, {"dict": [["a", 1, 2]]}, {"dict": [{"a": 1}]}),
    {"dict": [["a", 1], ["a", 2]]},
    *({"dict": [[key, 1]]} for key in ([], {"dict": []}, {"tensor": "t"}, {"tuple": [[]]}, {"bytes": "b"})),
    *({"tuple": content} for content in (None, "ab", {"tuple": []}, 3)),
    *({"tensor": content} for content in (None, 0, "u", [], ["t"], [["t"], []], {"dict": []})),
    *({"tensor": ["t", order]} for order in (None, 1, [], [0], [0, 2], [0, 0], [0, 1, 2], [-1, 0])),
    *({"tensor": ["t", order]} for order in ([False, True], [0.0, 1.0], ["0", "1"], [[], []])),
    *({"bytes": content} for content in (None, "u", "t", "h", ["b"])),
    *({"float": content} for content in (None, 1.5, "nan", "7ff8", "7ff80000000000000000", "zz")),
    *({"int": content} for content in (None, 1, "", "xyz", "1.5")),
    *({"text": content} for content in (None, "a", "é", "/w==")),
    *(nested(102), nested(500)),
]


@pytest.mark.parametrize("tree", BAD_TREES, ids=lambda tree: repr(tree)[:40])
def test_forged_descriptions_are_refused(tmp_path: Path, tree: Any) -> None:
    path = forge(tmp_path / "x.ckpt", tree)
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match=r"^.*x\.ckpt: damaged, or not a checkpoint of lit-edit \(.+\)$"):
            load_tree(path, device)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "pt"}, "a safetensors file of another kind"),
        ({"version": "3"}, "of version '3', this lit-edit reads 1 and 2"),
        ({"version": "2"}, "the description of its contents is not what was written"),
    ],
)
def test_other_kinds_and_versions_are_refused(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_tree(forge(tmp_path / "x.ckpt", [], **change))


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="of another kind"):
        load_tree(tmp_path / "x.ckpt")


def test_a_description_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.ckpt", {"format": "lit-edit-checkpoint", "version": "1"})
    with pytest.raises(CheckpointError, match="tree"):
        load_tree(tmp_path / "x.ckpt")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt: no such file$"):
        load_tree(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_tree(tmp_path)


def test_files_cut_anywhere_are_refused(tmp_path: Path) -> None:
    save_tree({"a": torch.arange(5.0), "b": [1, "x"]}, tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x.ckpt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged, or not a checkpoint"):
            load_tree(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint"):
        load_tree(tmp_path / "x.ckpt")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_do_no_harm(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    save_tree({"a": torch.arange(6.0).reshape(2, 3).T, "b": [b"x", (math.nan, 1 << 70)]}, tmp_path / "x.ckpt")
    content = bytearray((tmp_path / "x.ckpt").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (tmp_path / "x.ckpt").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        load_tree(tmp_path / "x.ckpt")


TREE = {"a": torch.arange(6.0).reshape(2, 3).T, "p": torch.ones(4, 4, dtype=torch.float64), "b": [b"x", math.nan]}


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file, counted from its end where negative."""
    content = bytearray(path.read_bytes())
    content[(bit // 8) % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 1 << 14))
def test_one_flipped_bit_anywhere_is_found_or_of_no_consequence(tmp_path: Path, bit: int) -> None:
    save_tree(TREE, tmp_path / "x.ckpt")
    flip(tmp_path / "x.ckpt", bit)
    try:
        loaded = load_tree(tmp_path / "x.ckpt")
    except CheckpointError:
        return
    assert_same(TREE, loaded)


@pytest.mark.parametrize("bit", [-1, -8, -65, -128 * 8])
def test_a_flipped_bit_of_a_tensor_is_found_and_named(tmp_path: Path, bit: int) -> None:
    """Signs, exponents and last digits; where values are not asked for, they are not read."""
    save_tree({"p": torch.ones(4, 4, dtype=torch.float64)}, tmp_path / "x.ckpt")
    check_tree(tmp_path / "x.ckpt")
    flip(tmp_path / "x.ckpt", bit)
    load_tree(tmp_path / "x.ckpt", "meta")
    for read in (load_tree, check_tree):
        with pytest.raises(CheckpointError, match=r"x\.ckpt: damaged.*checkpoint\['p'\] is not what was written"):
            read(tmp_path / "x.ckpt")


def test_tensors_at_odd_places_are_refused_or_right(tmp_path: Path) -> None:
    """A file of ours never holds numbers that are not aligned."""
    save_tree(torch.ones(2), tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    head = whole[8 : 8 + length].rstrip() + b" "
    head += b" " * (1 - len(head) % 2)  # an odd length
    (tmp_path / "x.ckpt").write_bytes(struct.pack("<Q", len(head)) + head + whole[8 + length :])
    with contextlib.suppress(CheckpointError):
        assert load_tree(tmp_path / "x.ckpt").tolist() == [1.0, 1.0]


def test_a_damaged_file_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """The length of its header can begin like one."""
    (tmp_path / "x.ckpt").write_bytes(struct.pack("<Q", 0x0280) + b'{"__metadata__"')
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint"):
        load_tree(tmp_path / "x.ckpt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_of_torch_save_are_not_read(tmp_path: Path, zipped: bool) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for content in ({"lit_edit": {}}, Bomb()):
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        for read in (load_tree, AtomicCheckpointIO().load_checkpoint):
            with pytest.raises(
                CheckpointError, match=r"earlier version of lit-edit or by another program \(torch.save\)"
            ):
                read(tmp_path / "x.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


# ---- Lightning's files --------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3)}, tmp_path / "deep" / "x.ckpt")
    for weights_only in (True, False, None):
        loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "deep" / "x.ckpt", weights_only=weights_only)
        assert loaded["a"].tolist() == [0, 1, 2]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("where", ["meta", torch.device("meta")])
def test_checkpoints_go_to_the_device_that_is_asked_for(tmp_path: Path, where: Any) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3)}, str(tmp_path / "x.ckpt"))
    assert AtomicCheckpointIO().load_checkpoint(str(tmp_path / "x.ckpt"), map_location=where)["a"].is_meta
    for other in (None, lambda storage, where: storage, {"cpu": "meta"}):
        assert AtomicCheckpointIO().load_checkpoint(str(tmp_path / "x.ckpt"), map_location=other)["a"].is_cpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_come_back(tmp_path: Path) -> None:
    value = torch.randn(5, 4, dtype=torch.float64)
    there = value.cuda()
    tree = {"a": there, "t": there.T, "part": there[:, 1:3], "row": there[1], "host": value}
    expected = {"a": value, "t": value.T, "part": value[:, 1:3], "row": value[1], "host": value}
    assert_same(expected, there_and_back(tree, tmp_path))
    loaded = load_tree(tmp_path / "tree.ckpt", "cuda")
    assert all(part.is_cuda for part in loaded.values())
    assert_same(expected, {name: part.cpu() for name, part in loaded.items()})


def test_remote_files_are_left_to_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    remote = f"file://{tmp_path}/x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3)}, remote)
    assert AtomicCheckpointIO().load_checkpoint(remote)["a"].tolist() == [0, 1, 2]
    torch.save(Bomb(), tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(remote, weights_only=False)
    assert not (tmp_path / "exploded").exists()


def test_options_for_storage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={"a": 1})


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "rust"],
)
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    file = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, file)

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(lit_edit.files.tensor_files, "save_file", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            AtomicCheckpointIO().save_checkpoint({"a": 2}, file)
    assert caught.value.errno == 28
    assert load_tree(file) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_other_failures_of_safetensors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise SafetensorError("header too large")

    monkeypatch.setattr(lit_edit.files.tensor_files, "save_file", fail)
    with pytest.raises(SafetensorError, match="header too large"):
        save_tree({}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


# ---- runs -----------------------------------------------------------------------------------------------------------


class Keeps(Callback):
    """Has a state of the kinds that callbacks have."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state or {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def checkpointed(folder: Path, *more: Any, count: int = 2) -> list[Any]:
    """Fit a few edits, with a checkpoint after each and one that a link points to."""
    writer = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, save_last="link")
    stream = make_stream()
    trainer = make_trainer(folder, [writer, *more])
    trainer.fit(stream, make_data(count))
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    return [stream, trainer]


def is_pickle(path: Path) -> bool:
    """Tell whether a file is one, holds one under the name that torch.save gives it, or begins with one."""
    if zipfile.is_zipfile(path):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    content = path.read_bytes()
    if content[:1] != b"\x80" or content[1:2] > b"\x05":
        return False
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    except ValueError:
        return False  # the length of a header can look like the beginning of one


def test_the_scan_sees_pickles(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        assert is_pickle(tmp_path / "x")


def test_a_run_leaves_no_pickle_behind(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if is_pickle(path)] == []
    checkpoints = [path for path in files if path.suffix == ".ckpt"]
    assert len(checkpoints) >= 3
    for path in checkpoints:
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "lit-edit-checkpoint"
        assert "lit_edit" in load_tree(path)


@pytest.mark.parametrize("options", [{}, {"weights_only": True}, {"weights_only": False}], ids=str)
def test_a_stream_resumes_from_its_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    state = {"numbers": [1.5, math.inf], "by place": {(1, "a"): torch.ones(2)}, 7: (True, None)}
    whole, _ = checkpointed(tmp_path / "whole", Keeps(state), count=4)
    kept, resumed = Keeps(), make_stream()
    trainer = make_trainer(tmp_path / "resumed", [kept])
    path = tmp_path / "whole" / "checkpoints" / "epoch=0-step=2.ckpt"
    trainer.fit(resumed, make_data(4), ckpt_path=str(path), **options)
    assert_same(state, kept.state)
    assert trainer.global_step == 4
    left, right = state_of(whole), state_of(resumed)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_fresh_trainer_measures_from_a_checkpoint(tmp_path: Path, command: str) -> None:
    """Lightning loads the checkpoint after the stream's ``setup``, which says how."""
    stream, _ = checkpointed(tmp_path)
    fresh = make_stream()
    path = tmp_path / "checkpoints" / "last.ckpt"
    getattr(make_trainer(tmp_path / "fresh"), command)(fresh, make_data(2), ckpt_path=path)
    for name, delta in stream.ledger.deltas.items():
        assert torch.equal(delta, fresh.ledger.deltas[name])


def test_a_trainer_finds_its_own_checkpoints(tmp_path: Path) -> None:
    stream, trainer = checkpointed(tmp_path)
    trainer.validate(stream, make_data(2), ckpt_path="last")
    assert len(stream.ledger) == 2
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert load_tree(tmp_path / "own.ckpt")["global_step"] == 2


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_runs_refuse_pickles_and_damage(tmp_path: Path, command: str) -> None:
    torch.save({"lit_edit": {}}, tmp_path / "old.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(b"garbage")
    for name, message in (("old", "torch.save"), ("bad", "damaged"), ("none", "no such file")):
        trainer = make_trainer(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            getattr(trainer, command)(make_stream(), make_data(1), ckpt_path=tmp_path / f"{name}.ckpt")


def test_a_state_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['Keeps'\]\['odd'\] is a set"):
        checkpointed(tmp_path, Keeps({"odd": {1, 2}}))
    assert list(tmp_path.rglob("*.ckpt*")) == []


def test_giving_memory_back_is_harmless() -> None:
    release_free_memory()
    release_free_memory()
