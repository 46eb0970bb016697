"""Memory and time of a stream of edits, worked out from shapes alone: no weights are loaded and nothing is run.

Memory is what the engine holds (docs/memory.md), rank by rank: what stays through the stream, and what comes and goes,
of which only the largest counts. Time is the work of an edit (as ``benchmarks/limit.py`` counts it) over the speed of a
device, or the bytes it must move over its bandwidth, whichever takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.planning.sizes import ModelSizes
from lit_edit.planning.workload import Workload
from lit_edit.solvers.storage import SolverStorage

Strategy = Literal["single", "ddp", "fsdp2"]
Place = Literal["device", "host", "disk"]

CHUNK_TOKENS = 768  # as lit_edit.targets.window cuts them
HEAD_ROWS = 128  # states that the head sees at a time
FOLD_EVERY = 64  # facts that the solver keeps as columns
MEASURED_TOKENS = 2048  # of probes, at a time
SAMPLED = (128, 32)  # rows of text sampled at a time for the statistics, and their tokens

CPU_PROCESS = 0.5e9  # Python, torch and all else with a run under way: that of a tiny model, measured
HOST_LINK = 25e9  # bytes per second between host and device, assumed
HOST_PROCESS = 1.0e9  # the same, beside a GPU, assumed
GPU_CONTEXT = 0.7e9  # what CUDA and its libraries take of a device, assumed
PADDING = 1.6  # places per token in attention, whose rows are padded to blocks, measured
PIECES = 1.25  # what allocators take for what comes and goes, in pieces that do not fit, measured on a CPU
ROUNDED = 0.6  # of what exact products reach of their rate, those that are rounded reach of theirs, measured
CPU_LAUNCH, GPU_LAUNCH = 1.5e-3, 0.5e-3  # seconds of Python per layer and pass; a GPU computes meanwhile. Estimated


@dataclass(frozen=True)
class Setup:
    """How a stream is run."""

    dtype: torch.dtype  # of the weights
    devices: int = 1  # in all, over all nodes
    strategy: Strategy = "single"  # ddp: each rank has the whole model; fsdp2: they share the decoder layers
    gpu: bool = False  # whether devices have a memory of their own
    window: int = 32  # edits whose targets are fitted together
    batch: int = 1  # edits of a step
    edits: int | None = None  # of the stream; None for many
    statistics: int = 0  # tokens that key statistics are to read, at least
    storage: SolverStorage = SolverStorage()  # noqa: RUF009 - frozen; of the solver's matrices
    rounded: bool = False  # whether the layers above are multiplied in bfloat16 copies

    @property
    def folded(self) -> bool:
        """Whether facts are folded into the sums before the stream ends."""
        return self.edits is None or self.edits >= FOLD_EVERY


@dataclass(frozen=True)
class Speed:
    """What a device can do."""

    rate: float  # operations per second of matrix products in the type of the weights
    bandwidth: float  # bytes per second to and from its memory
    utilisation: float = 0.55  # share of rate that passes of the engine reach
    link: float = 100e9  # bytes per second between devices
    host: float = 100e9  # operations per second in float64 on the host, where key statistics are summed up
    host_bandwidth: float = 30e9  # bytes per second to and from the host's memory
    short: float | None = None  # like rate, of products that are rounded to bfloat16; None if the same
    source: str = "given"  # where this comes from, for people


@dataclass(frozen=True)
class Item:
    """Something that takes memory."""

    name: str
    first: float  # bytes on rank 0
    others: float  # bytes on each other rank
    place: Place = "device"
    passing: bool = False  # whether it comes and goes; of those only the largest counts


@dataclass(frozen=True)
class Phase:
    """Something that takes time."""

    name: str
    operations: float  # floating-point operations of one edit, over all ranks
    seconds: float  # of one edit


@dataclass(frozen=True)
class Plan:
    """What a stream of edits takes."""

    items: tuple[Item, ...]  # what takes memory
    phases: tuple[Phase, ...]  # what takes time, edit by edit
    once: tuple[Phase, ...]  # what takes time once, before the first edit

    def total(self, place: Place = "device", first: bool = True) -> float:
        """Return the bytes in a place at the worst moment, on rank 0 or on each other rank."""
        here = [(item.first if first else item.others, item.passing) for item in self.items if item.place == place]
        return sum(size for size, passing in here if not passing) + max(
            (s for s, passing in here if passing), default=0
        )

    @property
    def peak(self) -> float:
        """Bytes on the device that needs most."""
        return max(self.total(), self.total(first=False))

    @property
    def seconds(self) -> float:
        """Of one edit, without measuring it."""
        return sum(phase.seconds for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        places: tuple[Place, ...] = ("device", "host", "disk")
        return {
            "items": [asdict(item) for item in self.items],
            "bytes": {p: {"first": self.total(p), "others": self.total(p, first=False)} for p in places},
            "phases": [asdict(phase) for phase in self.phases],
            "once": [asdict(phase) for phase in self.once],
            "seconds_per_edit": self.seconds,
        }


def make_plan(sizes: ModelSizes, editor: ClosedFormEditor, setup: Setup, workload: Workload, speed: Speed) -> Plan:
    """Return memory per device and time per edit."""
    items = [*_staying(sizes, editor, setup, workload), *_passing(sizes, editor, setup, workload)]
    if setup.devices == 1:
        items = [replace(item, others=0.0) for item in items]
    shown = tuple(item for item in items if item.first or item.others)
    return Plan(shown, _phases(sizes, editor, setup, workload, speed), _once(sizes, setup, speed))


# ---- memory -------------------------------------------------------------------------------------------------------


def _staying(sizes: ModelSizes, editor: ClosedFormEditor, setup: Setup, workload: Workload) -> list[Item]:
    size = setup.dtype.itemsize
    layers = size * sum(sizes.layers)
    rest = size * sizes.parameters - layers
    cut = setup.devices if setup.strategy == "fsdp2" else 1  # the model; edited layers are whole on every rank besides
    solver = _solver_place(setup)
    kept: Place = "disk" if setup.storage.offload == "disk" else solver
    squares, wide = sizes.squares(8), sizes.wide(8)
    inverse = sizes.squares(setup.storage.inverse_dtype.itemsize)
    columns = 8 * FOLD_EVERY * sum(2 * d_in + d_out for d_out, d_in in sizes.shapes)
    items = [
        _even("CUDA", GPU_CONTEXT) if setup.gpu else _even("process and libraries", CPU_PROCESS),
        _even("weights", layers / cut + rest),
        _even("layers gathered to be run, two at a time", 2 * size * max(sizes.layers) if cut > 1 else 0),
        _even("edited layers: original and written values", 2 * sizes.wide(size)),
        Item("statistics: prior", squares, 0, kept),
        Item("statistics: P", inverse, 0, solver),
        Item("statistics: G", squares if editor.memory and setup.folded else 0, 0, kept),
        *_update(wide, solver),
        Item("solution: A and the latest facts", columns + (wide if setup.folded else 0), 0, solver),
        _even("window: states, attention keys and values", _window(sizes, setup, workload)),
    ]
    if setup.gpu:
        loading = size * sizes.parameters if cut == 1 else 0.0  # parts are read straight to where they belong
        items.append(_even("process", HOST_PROCESS, "host"))
        items.append(_even("weights while they load", loading, "host", passing=True))
    return items


def _solver_place(setup: Setup) -> Place:
    return "host" if setup.gpu and setup.storage.offload != "none" else "device"


def _update(size: float, solver: Place) -> list[Item]:
    """Return the running solution: it lives with the solver on rank 0, and on the device of every other rank."""
    name = "solution: the update"
    return [_even(name, size)] if solver == "device" else [Item(name, size, 0, solver), Item(name, 0, size)]


def _passing(sizes: ModelSizes, editor: ClosedFormEditor, setup: Setup, workload: Workload) -> list[Item]:
    size = setup.dtype.itemsize
    square = 8 * sizes.d_in**2
    logits = 3 * HEAD_ROWS * sizes.vocabulary * 4
    rounded = 2 * (sum(sizes.matrices[n] for n in sizes.above) + sizes.head) if setup.rounded else 0
    rows, length = SAMPLED
    # The solver is made behind the statistics, and its sums when the first facts are folded.
    later = sizes.squares(8) + sizes.squares(setup.storage.inverse_dtype.itemsize)
    folded = sizes.squares(8) + sizes.wide(8) if setup.folded and editor.memory else 0
    solver = _solver_place(setup)
    later, folded = (0, 0) if solver == "host" else (later, folded)
    sums = 0 if setup.gpu else sizes.squares(8)
    text = rows * length * 2 * sizes.key_values * len(sizes.layers) * size + logits + sums
    probes = MEASURED_TOKENS * (sizes.kept + 6 * sizes.d_model) * size + logits
    solved = sizes.wide(8) + (2 * 8 + size) * sizes.one_wide
    items = [
        _even("targets: activations of a chunk, logits", _fitting(sizes, setup, workload) + rounded, passing=True),
        _even("an edit solved: new updates, a layer's weight", solved, passing=True),
        _even("probes measured", PIECES * probes, passing=True),
        Item("P factorised", max(0, 3 * square - folded), 0, solver, passing=True),
        _even("text for the statistics", max(0, PIECES * text - later - folded), passing=True),
    ]
    if setup.gpu:
        items.append(_even("sums of the statistics", sizes.squares(8), "host", passing=True))
    if solver == "host":
        items.append(Item("statistics on their way to the solver", sizes.squares(8), 0, passing=True))
    return items


def _even(name: str, size: float, place: Place = "device", passing: bool = False) -> Item:
    return Item(name, size, size, place, passing)


def _window(sizes: ModelSizes, setup: Setup, workload: Workload) -> float:
    """Return the bytes of what a window keeps: states, and attention keys and values of what comes before."""
    size, window = setup.dtype.itemsize, max(setup.window, setup.batch)
    states = 3 * (workload.shared + workload.own + workload.keys) * sizes.d_model * size
    before = workload.shared * 2 * sizes.key_values * len(sizes.above) * size
    return window * (states + before + sizes.vocabulary * 4)  # and the log-probabilities of the KL terms


def chunk_tokens(setup: Setup, workload: Workload) -> tuple[float, int]:
    """Return the tokens that a rank runs at a time when all edits of a window are fitted, and how many times."""
    total = max(setup.window, setup.batch) * workload.own
    chunks = math.ceil(max(1, math.ceil(total / CHUNK_TOKENS)) / setup.devices) * setup.devices
    return total / chunks, chunks // setup.devices


def _fitting(sizes: ModelSizes, setup: Setup, workload: Workload) -> float:
    """Return the bytes of a step: what layers keep for the way back, one layer's gradients, and the head's matrices."""
    size = setup.dtype.itemsize
    tokens, _ = chunk_tokens(setup, workload)
    span = workload.own / workload.rows
    length = workload.keys / max(1.0, workload.rows - 1)  # of what comes before, as far as it is not shared
    shared = sizes.queries if setup.gpu else sizes.key_values  # kernels of GPUs want keys for every head
    norms = 2 * sizes.d_model * (size if size >= 4 else size + 4)
    attention = PADDING * (sizes.queries + 2 * shared * (span + length) / span)
    scores = PADDING * sizes.heads * (span + length) * 4
    token = norms + (attention + sizes.kept) * size + scores
    back = 2 * (sizes.kept + 2 * sizes.d_model) * size
    read = min(HEAD_ROWS, max(1.0, tokens / workload.own * workload.read))
    logits = read * sizes.vocabulary * (12 if size >= 4 else 12 + 2 * size)
    return PIECES * (tokens * (token * len(sizes.above) + back) + logits)


# ---- time ---------------------------------------------------------------------------------------------------------


def _phases(
    sizes: ModelSizes, editor: ClosedFormEditor, setup: Setup, workload: Workload, speed: Speed
) -> tuple[Phase, ...]:
    window = max(setup.window, setup.batch)
    above = 2.0 * sum(sizes.matrices[n] for n in sizes.above)
    below = 2.0 * sum(sizes.matrices[: sizes.edited[-1] + 1])
    edited = 2.0 * sum(sizes.matrices[sizes.edited[0] : sizes.edited[-1] + 1])
    every = [*range(len(sizes.layers))]
    walk = [*range(sizes.edited[0], sizes.edited[-1] + 1)]
    if editor.residual == "remeasured":  # what is missing is measured behind the last layer, after each
        walk += [later for layer in sizes.edited[1:] for later in range(layer + 1, sizes.edited[-1] + 1)]

    passes = 2 * workload.steps - 1  # forward at each step, backward at each but the last
    fit = passes * (workload.own * above + workload.read * 2.0 * sizes.head)
    _, chunks = chunk_tokens(setup, workload)
    quick = replace(speed, rate=ROUNDED * speed.short) if setup.rounded and speed.short else speed
    fitting = _pass_seconds(fit * window / setup.devices, sizes, [*sizes.above], passes * chunks, setup, quick)
    base = (workload.shared + workload.own) * below + workload.shared * above
    first = _pass_seconds(base * window, sizes, every, 1, setup, speed)
    keys = workload.keys * edited
    walked = _pass_seconds(keys * setup.batch, sizes, walk, 1, setup, speed)

    solve = sum(2.0 * (d_in * d_in + 2 * d_in * d_out) for d_out, d_in in sizes.shapes)
    # An edit reads P once and the update thrice; weights go through memory nine times until they are looked at.
    solved = sizes.squares(setup.storage.inverse_dtype.itemsize) + 3 * sizes.wide(8)
    if _solver_place(setup) == "host":  # and the update goes to the device
        read = solved / speed.host_bandwidth + sizes.wide(8) / HOST_LINK
    else:
        read = solved / speed.bandwidth
    moved = max(solve / speed.host, read + 9 * sizes.wide(8) / speed.bandwidth)
    return (
        Phase("targets", fit + base, (fitting + first) / window),
        Phase("keys", keys, walked / setup.batch),
        Phase("solve", solve, moved / setup.batch),
    )


def _once(sizes: ModelSizes, setup: Setup, speed: Speed) -> tuple[Phase, ...]:
    tokens = max(setup.statistics, 10 * sizes.d_in)
    rows, length = SAMPLED
    every = [*range(len(sizes.layers))]
    sample = tokens * 2.0 * (sum(sizes.matrices) + sizes.head)
    read = tokens * 2.0 * sum(sizes.matrices[: sizes.edited[-1] + 1])
    gram = tokens * sum(float(d_in) ** 2 for _, d_in in sizes.shapes)
    shared = 1 if setup.strategy == "fsdp2" else setup.devices
    chunks = tokens / (rows * length)
    seconds = _pass_seconds(sample / shared, sizes, every, chunks * length / shared, setup, speed)
    seconds += _pass_seconds(read / shared, sizes, every[: sizes.edited[-1] + 1], chunks / shared, setup, speed)
    seconds += gram / speed.host / shared
    on_gpu = setup.gpu and _solver_place(setup) == "device"  # where float64 has a sixteenth of bfloat16's rate
    factorised = sum(2.0 * float(d_in) ** 3 for _, d_in in sizes.shapes)
    return (
        Phase("key statistics", sample + read + gram, seconds),
        Phase("P factorised", factorised, factorised / (speed.rate / 16 if on_gpu else speed.host)),
    )


def _pass_seconds(
    operations: float, sizes: ModelSizes, layers: Sequence[int], passes: float, setup: Setup, speed: Speed
) -> float:
    """Return what ``passes`` through some layers, which may stand there twice, take on one rank.

    A GPU computes, reads weights and waits for Python at the same time; on a CPU Python comes on top.
    ``operations`` are those of all passes.
    """
    weights = setup.dtype.itemsize * sum(sizes.layers[n] for n in layers)
    moving = max(operations / (speed.rate * speed.utilisation), passes * weights / speed.bandwidth)
    python = passes * len(layers) * (GPU_LAUNCH if setup.gpu else CPU_LAUNCH)
    gathered = weights * (setup.devices - 1) / setup.devices if setup.strategy == "fsdp2" else 0.0
    return (max(moving, python) if setup.gpu else moving + python) + passes * gathered / speed.link


# ---- what to change -----------------------------------------------------------------------------------------------


def suggestions(setup: Setup) -> Mapping[str, Setup]:
    """Return setups that need less memory, each by what is to be set, from the one that costs least."""
    found: dict[str, Setup] = {}
    if setup.dtype.itemsize > 2:
        found["--model.language_model.dtype bfloat16"] = replace(setup, dtype=torch.bfloat16)
    storage = setup.storage
    if storage.inverse == "float64":
        storage = replace(storage, inverse="float32")
        found["--model.editor.init_args.storage.inverse float32"] = replace(setup, storage=storage)
    if setup.devices > 1 and setup.strategy != "fsdp2":
        found["--strategy fsdp2"] = replace(setup, strategy="fsdp2")
    offload: Literal["cpu", "disk"] = "cpu" if setup.gpu else "disk"
    if setup.storage.offload == "none":
        found[f"--model.editor.init_args.storage.offload {offload}"] = replace(
            setup, storage=replace(setup.storage, offload=offload)
        )
    if setup.window > 8:
        found["--data.target_window 8"] = replace(setup, window=8)
    return found
