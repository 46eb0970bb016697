"""The command line: ``lit-edit COMMAND``.

Nothing heavy is imported before it is known what is wanted.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import traceback
from collections.abc import Sequence

HELP = """\
lit-edit: change facts in a language model, one after another, without wearing it out

usage: lit-edit COMMAND [options]

commands:
  fit        edit a model:             lit-edit fit --config quickstart
  validate   measure without editing:  lit-edit validate --config quickstart [--ckpt_path runs/x/checkpoints/last.ckpt]
  test       the same, under Lightning's test loop
  sweep      run a grid of them:       lit-edit sweep --config sweep/editors
  compare    editors on one stream:    lit-edit compare --config compare
  build      make a data set:          lit-edit build mqd --out mqd
  study      a question, answered:     lit-edit study mqd --edits 20
  editors    the methods there are:    lit-edit editors (or lit-edit editors D4S: one in full)
  ask        compare answers:          lit-edit ask --run runs/x "The capital of Italy is"
  export     take the edits away:      lit-edit export --run runs/x --as model (or delta, or lora)
  apply      put them into the base:   lit-edit apply --delta edited.safetensors --model smollm2-135m
  log        list a run's edits:       lit-edit log --run runs/x
  undo       take edits out again:     lit-edit undo --run runs/x --edit 17 (or --last 3, --subject Italy)
  redo       put them back:            lit-edit redo --run runs/x --edit 17
  trace      where facts are recalled: lit-edit trace --data known_facts.json --model smollm2-135m
  mine-hard  edits that break it:      lit-edit mine-hard --method method/rome --data counterfact.json
  choose-layers  for a new model:  lit-edit choose-layers --model smollm2-135m --data counterfact.json
  report     a run as a web page:      lit-edit report --run runs/x (--runs runs/a runs/b compares)
  plan       memory and time of a fit: lit-edit plan --config quickstart --devices 2 --tflops 400
  ability    tasks beside the edits:   lit-edit ability --run runs/x --tasks sst2 mmlu --at 0 100 300
  eval-harness  both in lm-eval:   lit-edit eval-harness --run runs/x --tasks sst2 mmlu --limit 50
  stats      compute key statistics ahead of a run
  models     list known models, what is cached, and the configs that ship
  version    print the version

lit-edit COMMAND --help explains each. A run leaves everything in runs/<name>/; --run_name names it.
--config takes a YAML file or the name of one that ships (lit-edit models lists them), several times if you like.
"""

LIGHTNING_COMMANDS = ("fit", "validate", "test")
TOOLS = (
    "ask",
    "export",
    "apply",
    "log",
    "undo",
    "redo",
    "report",
    "plan",
    "trace",
    "stats",
    "models",
    "ability",
    "eval-harness",
    "choose-layers",
    "mine-hard",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 2 bad arguments or data, 1 anything else."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if args else 2
    command, rest = args[0], args[1:]
    if command in ("version", "--version", "-V"):
        from importlib.metadata import version

        sys.stdout.write(f"lit-edit {version('lit-edit')}\n")
        return 0
    if command not in (*LIGHTNING_COMMANDS, "sweep", "compare", "build", "study", "editors", *TOOLS):
        sys.stderr.write(f"lit-edit: error: unknown command {command!r}\n\n{HELP}")
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin long while they wait make everything several times slower as soon as another program wants a
    # core; this short costs nothing on a quiet machine. Read by GNU OpenMP when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Compiled matrix products are kept by shape, and here every pass has another: hundreds of megabytes for nothing.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    from lit_edit.errors import RunStoppedError, UserError

    try:
        if command in LIGHTNING_COMMANDS:
            from lit_edit.cli.fit import run_training

            run_training(command, rest)
        elif command == "sweep":
            from lit_edit.cli.sweep import run_sweep

            return run_sweep(rest)
        elif command == "compare":
            from lit_edit.cli.compare import run_compare

            return run_compare(rest)
        elif command == "build":
            from lit_edit.cli.build import run_build

            run_build(rest)
        elif command == "study":
            from lit_edit.cli.study import run_study

            return run_study(rest)
        elif command == "editors":
            from lit_edit.cli.editors import run_editors

            run_editors(rest)
        else:
            from lit_edit.cli.tools import run_tool

            run_tool(command, rest)
    except UserError as error:
        return _fail(error, 2)
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":
            return _fail(error, 2)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _fail(
                f"the disk is full ({error}); what was being written is incomplete. Make room and run again", 1
            )
        if isinstance(error, OSError) and error.filename is not None:  # a place that the user has named
            return _fail(f"{error.filename}: {error.strerror}", 2)
        if type(error).__name__ == "EditRefusedError" or isinstance(error, (RunStoppedError, FloatingPointError)):
            return _fail(error, 1)
        raise
    except KeyboardInterrupt:
        sys.stderr.write("lit-edit: interrupted\n")
        return 130
    return 0


def _fail(error: Exception | str, status: int) -> int:
    sys.stderr.write(f"lit-edit: error: {error}\n")
    return status


def entry() -> None:
    """Entry point of the ``lit-edit`` script."""
    try:
        status: object = main()
    except SystemExit as error:
        status = error.code
    except BaseException:
        if not _has_met_others():
            raise
        traceback.print_exc()
        status = 1
    if _has_met_others():
        _leave(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)  # type: ignore[arg-type]


def _has_met_others() -> bool:
    """Tell whether this process is one of several that work together."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(status: int) -> None:
    """End at once: gloo's threads still run, and Python's own end, which takes their objects away, can abort."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
