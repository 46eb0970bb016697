"""``report``: a run, or several, as a web page."""

from __future__ import annotations

import sys
from pathlib import Path

from lit_edit.console.arguments import make_parser
from lit_edit.files.paths import expand


def run_report(args: list[str]) -> None:
    """Write ``report.html`` of a run, or a page that compares several."""
    parser = make_parser(
        "report",
        "Write a run as a web page of one file, report.html in its folder: numbers, curves, all edits, what failed. A "
        "fit does so at its end; this makes it anew, also of a run that was killed. Several runs are compared.",
    )
    more = {"nargs": "+", "dest": "runs", "metavar": "RUN", "help": "one run folder or more: runs/x"}
    parser.add_run(aliases=("--runs",), **more)
    parser.add_out("the file; report.html in the run's folder, or compared.html here")
    options = parser.parse_args(args)

    from lit_edit.errors import ArgumentError
    from lit_edit.report import write_comparison, write_report

    runs = list(dict.fromkeys(expand(folder) for folder in options.runs))
    out = None if options.out is None else expand(options.out)
    if out is not None and out.is_dir():
        raise ArgumentError(f"--out {out} is a folder; give the name of a file, for example {out / 'report.html'}")
    written = write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out or Path("compared.html"))
    sys.stdout.write(f"{written}\n")
