"""``lit-edit eval-harness``: the base model and the edited model of a run, measured by EleutherAI's lm-eval."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.errors import ArgumentError, NotHereError, counted
from lit_edit.files.extras import import_extra
from lit_edit.files.paths import expand

log = logging.getLogger(__name__)

Results = dict[str, dict[str, Any]]
"""By task: what lm-eval says of it (``acc,none``, ``acc_stderr,none``, ``alias`` ...)."""


def run_eval_harness(args: list[str]) -> None:
    """Measure, print a table, and write ``eval_harness.json`` into the run folder."""
    parser = make_parser(
        "eval-harness", "Measure the base model and the edited model of a run with lm-eval (lit-edit[harness])."
    )
    parser.add_run()
    parser.add_argument("--tasks", required=True, nargs="+", help="lm-eval's names: sst2 mrpc cola rte mmlu hellaswag")
    parser.add_limit("items of each task; by default all")
    parser.add_argument("--shots", type=int, default=None, help="examples per item; by default as the task has it")
    parser.add_argument("--batch_size", type=positive, default=8, help="rows that the model sees at a time")
    parser.add_argument("--include_path", type=Path, default=None, help="a folder with tasks of your own (YAML)")
    parser.add_argument("--base", action="store_true", help="the base model alone; by default both")
    parser.add_argument("--edited", action="store_true", help="the edited model alone; by default both")
    options = parser.parse_args(args)
    if options.shots is not None and options.shots < 0:
        parser.error(f"argument --shots: must not be negative, got {options.shots}")
    if options.include_path is not None and not options.include_path.is_dir():
        raise ArgumentError(f"--include_path {options.include_path}: there is no such folder")
    lm_eval = import_lm_eval()  # before the model is loaded

    from lit_edit.console.tables import print_whole
    from lit_edit.files.paths import without_nan, write_json
    from lit_edit.runs.folder import open_run

    folder = None if options.include_path is None else str(options.include_path)
    manager = lm_eval.tasks.TaskManager(include_path=folder)
    check_tasks(manager, options.tasks)
    run = open_run(options.run)
    adapter = run.ledger.adapter
    harness = lm_eval.models.huggingface.HFLM(
        pretrained=adapter.model, tokenizer=run.tokenizer, batch_size=options.batch_size
    )

    def measure(which: str) -> Results:
        log.info("measuring the %s model", which)
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=options.tasks,
                num_fewshot=options.shots,
                limit=options.limit,
                bootstrap_iters=1000,  # of metrics that have no standard error in closed form
                task_manager=manager,
                log_samples=False,
            )
        except OSError as error:  # what the hub's client raises, all of it
            raise ArgumentError(
                f"lm-eval cannot load {' '.join(options.tasks)}: {error}; its tasks come from the hub, those of "
                "--include_path may read files"
            ) from error
        return plain_results(found)

    both = options.base == options.edited
    measured: dict[str, Results] = {}
    if both or options.base:
        measured["base"] = measure("base")
    if both or options.edited:
        run.apply()
        if adapter.memory is not None and adapter.memory.routes([""]) is not None:
            raise ArgumentError(
                f"{type(run.editor).__name__} answers prompts along routes of its own, which lm-eval does not know: "
                "the callback lit_edit.callbacks.Ability measures tasks with them"
            )
        with adapter.patched():  # an editor may keep its edits beside the weights
            measured["edited"] = measure("edited")
    rows = result_rows(measured)
    settings = {"tasks": options.tasks, "limit": options.limit, "shots": options.shots, "edits": len(run.entries)}
    path = expand(options.run) / "eval_harness.json"
    version = str(getattr(lm_eval, "__version__", "unknown"))
    write_json(path, without_nan({"lm_eval": version, **settings, "results": measured, "rows": rows}))
    print_whole(result_table(rows, len(run.entries)))
    log.info("written to %s", path)


def import_lm_eval() -> Any:
    """Return lm-eval with the parts that are used; :class:`NotHereError` if it is not installed."""
    try:
        for part in ("models.huggingface", "tasks"):
            import_extra(f"lm_eval.{part}", "eval-harness")
    except NotHereError as error:
        also = "without it, the callback lit_edit.callbacks.Ability measures sst2, mrpc, cola, rte, nli and mmlu"
        raise NotHereError(f"{error}; {also}") from None
    return import_extra("lm_eval", "eval-harness")


def check_tasks(manager: Any, tasks: Sequence[str]) -> None:
    """Check that lm-eval knows some tasks, before a model is loaded."""
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ArgumentError(f"--tasks: lm-eval knows no task {task!r}; lm-eval ls tasks lists what it knows")


def plain_results(found: Mapping[str, Any] | None) -> Results:
    """Return, of what lm-eval returns, numbers and texts by task; groups (mmlu) are among them."""
    if found is None:  # on every rank but the first
        return {}
    everything = {**found["results"], **found.get("groups", {})}
    return {
        task: {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
        for task, values in everything.items()
    }


def result_rows(measured: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Return one row per task and metric: base, edited, their standard errors, and the change.

    Example:
        >>> base, edited = {"t": {"acc,none": 0.5, "acc_stderr,none": 0.25}}, {"t": {"acc,none": 0.75}}
        >>> result_rows({"base": base, "edited": edited})[0]["change"]
        0.25
    """
    rows = []
    for task in dict.fromkeys(task for results in measured.values() for task in results):
        values = {which: results.get(task, {}) for which, results in measured.items()}
        metrics = dict.fromkeys(name for result in values.values() for name, v in result.items() if _is_metric(name, v))
        for metric in metrics:
            name, _, kind = metric.partition(",")
            row: dict[str, Any] = {"task": task, "metric": name if kind in ("", "none") else f"{name} ({kind})"}
            for which, result in values.items():
                row[which] = _number(result.get(metric))
                row[f"{which}_stderr"] = _number(result.get(f"{name}_stderr,{kind}"))
            known = row.get("base") is not None and row.get("edited") is not None
            row["change"] = row["edited"] - row["base"] if known else None
            rows.append(row)
    return rows


def _is_metric(name: str, value: Any) -> bool:
    return _is_number(value) and "," in name and "_stderr" not in name  # sample_len and the like have no comma


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)  # numpy's float64 is a float


def _number(value: Any) -> float | None:
    """Return a number; lm-eval writes ``N/A`` where it has none."""
    return float(value) if _is_number(value) and math.isfinite(value) else None


def result_table(rows: Sequence[Mapping[str, Any]], edits: int) -> Any:
    """Return the rows as a table for a terminal."""
    from lit_edit.console.tables import table_of

    found = []
    for row in rows:
        cells = [_cell(row.get(which), row.get(f"{which}_stderr")) for which in ("base", "edited")]
        change = "–" if row["change"] is None else f"{row['change']:+.4f}"
        found.append((row["task"], row["metric"], *cells, change))
    headings = ("task", "metric", ">base", ">edited", ">change")
    return table_of(headings, found, whole=True, title=f"lm-eval, {counted(edits, 'edit')}")


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
