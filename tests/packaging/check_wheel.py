"""Checks an installed wheel: every module, every command, every config, one edit, one run.

    ENVIRONMENT/bin/python -I tests/packaging/check_wheel.py

Run by the Python of an environment that has lit-edit from a wheel; ``-I`` keeps this file's folder, and with it the
checkout, from ``sys.path``. One process for everything: most of the time goes into importing torch and transformers.
"""

from __future__ import annotations

import io
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import yaml


def check_origin() -> str:
    """lit-edit comes from the wheel, and from nowhere else."""
    import lit_edit

    installed = Path(lit_edit.__file__).parents[1]
    assert installed.is_relative_to(sys.prefix), f"lit_edit is imported from {installed}, which is not in {sys.prefix}"
    assert Path(str(distribution("lit-edit").locate_file(""))) == installed
    assert distribution("lit-edit").read_text("direct_url.json") is None or "editable" not in str(
        distribution("lit-edit").read_text("direct_url.json")
    )
    others = [path for path in sys.path if path != str(installed) and Path(path, "lit_edit").exists()]
    assert not others, f"there is another lit_edit on sys.path: {others}"
    return str(installed)


def check_imports() -> str:
    """Every module can be imported, the two packages that stand at the top of the repository included."""
    import lit_edit

    names = [found.name for found in pkgutil.walk_packages(lit_edit.__path__, "lit_edit.")]
    for name in names:
        import_module(name)
    assert {"lit_edit.callbacks.progress", "lit_edit.configs"} <= set(names)
    return f"{len(names)} modules"


def lit_edit_says(*words: str) -> str:
    """Run a command that must end well; return what it writes to its standard output."""
    from lit_edit.cli.main import main

    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained):
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = stop.code
    assert status in (0, None), f"lit-edit {' '.join(words)} ends with {status}:\n{complained.getvalue()}"
    return said.getvalue()


def check_help() -> str:
    """Every command explains itself, and so does every part of those that have parts."""
    from lit_edit.cli.build import DATA_SETS
    from lit_edit.cli.registry import COMMANDS
    from lit_edit.cli.study import STUDIES

    commands = [[command.name] for command in COMMANDS]
    commands += [["study", name] for name in STUDIES] + [["build", name] for name in DATA_SETS]
    assert ["fit"] in commands
    for command in commands:
        said = lit_edit_says(*command, "--help")
        assert re.search(r"usage:|^lit-edit [0-9.]+$", said), f"lit-edit {' '.join(command)} --help says {said!r}"
    return f"{len(commands)} commands"


def check_configs() -> str:
    """Every config that ships can be read: those of fit by fit, grids by sweep."""
    from lit_edit.console.configs import config_root, shipped_configs

    names = shipped_configs()
    assert {"quickstart", "compare", "method/d4s", "cluster/llama3_8b_ddp", "studies/d4s/stream"} <= set(names)
    for name in names:
        content = yaml.safe_load((config_root() / f"{name}.yaml").read_text("utf-8"))
        if "program" in content:  # of Weights & Biases' own sweeps: the rest of the file is its
            assert content["command"][:3] == ["lit-edit", "fit", "--config"]
        elif "grid" in content:
            assert "--run_name" in lit_edit_says("sweep", "--config", name, "--only", "0", "--dry-run")
        else:  # a piece needs the rest, which the quickstart has
            whole = "train" in content or name.startswith("train/") or {"model", "data", "trainer"} <= set(content)
            base = [] if whole else ["--config", "quickstart"]
            assert "class_path: lit_edit." in lit_edit_says("fit", *base, "--config", name, "--print_config")
    assert (config_root() / "cluster" / "slurm.sbatch").is_file()
    return f"{len(names)} configs"


def check_edit() -> str:
    """One fact, in one call."""
    from lit_edit import D4S, KeyStatistics, TargetSettings, edit
    from lit_edit.testing import tiny_model, tiny_tokenizer

    # With the subject last, the head reads the fitted state: even a random model says an object of one token.
    fact = {"prompt": "The capital of Italy", "subject": "Italy", "target_new": "Japan"}
    strong = TargetSettings(steps=30, kl_factor=0.0, weight_decay=0.0, clamp=50.0)
    editor = D4S(layers=[2], covariance_weight=1e-3, contexts="plain", target=strong)
    _, outcome = edit(tiny_model(), tiny_tokenizer(), [fact], editor, KeyStatistics(tokens=500))
    assert outcome.success > outcome.base["efficacy"]["accuracy"], outcome.final
    return "the model says the new object"


def check_run() -> str:
    """A run of the command line on a model from disk, with all that the shipped config adds; its page; its undoing."""
    from lit_edit.testing import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    settings = {
        "--model.language_model.name": "tiny",
        "--model.editor.init_args.layers": "[1,2]",
        "--model.statistics.tokens": "500",
        "--data.limit": "2",
        "--run_name": "x",
    }
    lit_edit_says("fit", "--config", "quickstart", *(f"{name}={value}" for name, value in settings.items()))
    run = Path("runs/x")
    assert (run / "summary.json").is_file()
    assert "<style>" in (run / "report.html").read_text("utf-8")
    lit_edit_says("undo", "--run", str(run), "--last", "1")
    return "fit, report, undo"


def main() -> None:
    """Run all checks in an empty folder; the first that fails ends it."""
    checks: tuple[Callable[[], str], ...] = (
        check_origin,
        check_imports,
        check_help,
        check_configs,
        check_edit,
        check_run,
    )
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LIT_EDIT_CACHE"] = str(Path(folder, "cache"))
        for check in checks:
            started = time.monotonic()
            found = check()
            sys.stdout.write(f"{check.__name__}: {found} ({time.monotonic() - started:.1f} s)\n")
            sys.stdout.flush()
        os.chdir("/")


if __name__ == "__main__":
    main()
