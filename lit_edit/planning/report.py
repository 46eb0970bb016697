"""What ``plan`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_edit.errors import counted
from lit_edit.planning.case import short_name
from lit_edit.planning.estimate import GPU_CONTEXT, GPU_LAUNCH, Place, make_plan, suggestions

if TYPE_CHECKING:
    from lit_edit.planning.case import Case
    from lit_edit.planning.estimate import Item, Phase, Plan, Setup


def show_plan(case: Case, plan: Plan, room: float | None) -> None:
    """Print the plan, for people."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=80, highlight=False)
    setup, sizes = case.setup, case.sizes
    devices = "1 device" if setup.devices == 1 else f"{setup.devices} devices ({setup.strategy})"
    layers = ", ".join(map(str, sizes.edited))
    title = (
        f"{case.name}: {sizes.parameters / 1e9:.3g} billion parameters in {short_name(setup.dtype)}; "
        f"{type(case.editor).__name__} on layers {layers}; {devices}"
    )
    console.print(escape(title), soft_wrap=False)
    console.print(_memory_table(case, plan))
    if room is not None:
        _say_whether_it_fits(console, case, plan, room)
    console.print(_time_table(case, plan))
    for line in _assumptions(case):
        console.print(escape(line))


def _memory_table(case: Case, plan: Plan) -> Any:
    from rich.table import Table

    several = case.setup.devices > 1
    table = Table(title="Memory of a device, GB" if case.setup.gpu else "Memory, GB", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("rank 0" if several else "GB", justify="right")
    if several:
        table.add_column("each other", justify="right")

    def add(name: str, first: float, others: float, **style: Any) -> None:
        table.add_row(name, _gb(first), *([_gb(others)] if several else []), **style)

    def add_items(items: Sequence[Item]) -> None:
        for item in items:
            add(item.name, item.first, item.others)

    here = [item for item in plan.items if item.place == "device"]
    add_items([item for item in here if not item.passing])
    table.add_section()
    table.add_row("of what follows only the largest at a time:", *([""] * (1 + several)), style="dim")
    add_items([item for item in here if item.passing])
    table.add_section()
    add("in all, at most", plan.total(), plan.total(first=False), style="bold")
    names: dict[Place, str] = {"host": "memory of the host, per process", "disk": "files"}
    for place, name in names.items():
        totals = [plan.total(place, first) for first in (True, False)]
        if any(totals):
            add(name, totals[0], totals[1])
    return table


def _time_table(case: Case, plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="Time", title_justify="left")
    for column in ("what", "TFLOP", "seconds"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def add_phases(phases: Sequence[Phase]) -> None:
        for phase in phases:
            table.add_row(phase.name, _work(phase.operations), _seconds(phase.seconds))

    add_phases(plan.phases)
    table.add_section()
    work = sum(phase.operations for phase in plan.phases)
    table.add_row("an edit", _work(work), _seconds(plan.seconds), style="bold")
    table.add_row("a thousand edits", _work(1000 * work), _seconds(1000 * plan.seconds))
    table.add_section()
    table.add_row("once:", "", "", style="dim")
    add_phases(plan.once)
    return table


def _say_whether_it_fits(console: Any, case: Case, plan: Plan, room: float) -> None:
    if plan.peak <= room:
        console.print(f"It fits: {_gb(plan.peak)} of {_gb(room)} GB.", style="green")
        return
    console.print(f"It does not fit: {_gb(plan.peak)} of {_gb(room)} GB. What would help:", style="red")
    together = case.setup
    for words, setup in suggestions(case.setup).items():
        less = make_plan(case.sizes, case.editor, setup, case.workload, case.speed).peak
        if less < 0.98 * plan.peak:
            console.print(f"  {words}: {_gb(less)} GB{', fits' if less <= room else ''}")
            together = _merged(together, case.setup, setup)
    least = make_plan(case.sizes, case.editor, together, case.workload, case.speed).peak
    if together != case.setup:
        console.print(f"  all of these: {_gb(least)} GB{', fits' if least <= room else ''}")
    if least > room:
        more = next((n for n in (2, 4, 8, 16, 32, 64) if _peak_on(case, together, n) <= room), None)
        where = f"and {more} devices with --strategy fsdp2 fit" if more else "and more devices do not help"
        console.print(f"  {where}" if together != case.setup else f"  {where.removeprefix('and ')}")


def _peak_on(case: Case, setup: Setup, devices: int) -> float:
    shared = replace(setup, devices=devices, strategy="fsdp2")
    if devices <= setup.devices:
        return float("inf")
    return make_plan(case.sizes, case.editor, shared, case.workload, case.speed).peak


def _merged(into: Setup, base: Setup, changed: Setup) -> Setup:
    """Return a setup with what another one changes of the base."""
    changes = {name: value for name, value in vars(changed).items() if value != getattr(base, name)}
    if "storage" in changes:
        ours = {n: v for n, v in vars(changed.storage).items() if v != getattr(base.storage, n)}
        changes["storage"] = replace(into.storage, **ours)
    return replace(into, **changes)


def _assumptions(case: Case) -> list[str]:
    work, setup, speed = case.workload, case.setup, case.speed
    source = "counted in the edits of this config" if work.counted else "as in CounterFact, the edits were not counted"
    edits = "more than 64 edits" if setup.edits is None else counted(setup.edits, "edit")
    lines = [
        f"A stream of {edits} in windows of {setup.window}; an edit has {work.rows:.3g} rows with {work.own:.3g} "
        f"tokens to be fitted ({source}), in {work.steps:.3g} steps.",
        f"{speed.source}; {speed.utilisation:.0%} of it is taken to be reached. Measuring edits comes on top.",
    ]
    if setup.gpu:
        lines.append(
            f"Taken for granted: {GPU_CONTEXT / 1e9:g} GB for CUDA, {1000 * GPU_LAUNCH:g} ms of Python for a layer and "
            f"pass; of the host {speed.host / 1e12:g} TFLOP/s in float64 and {speed.host_bandwidth / 1e9:g} GB/s."
        )
    if setup.strategy == "fsdp2":
        lines.append(f"Between devices {speed.link / 1e9:g} GB/s; gathering layers is not hidden behind computing.")
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _work(operations: float) -> str:
    """Return 10^12 operations, for people."""
    value = operations / 1e12
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "0.000"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
