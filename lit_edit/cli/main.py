"""The command line: ``lit-edit COMMAND``, and what comes of its errors.

Nothing heavy is imported before it is known what is wanted.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from lit_edit.cli.registry import BY_NAME, HELP
from lit_edit.console.terminal import show_messages
from lit_edit.errors import RunStoppedError, UserError, did_you_mean

ACCEPT = "--accept-licence"
"""What says that the terms of models that are fetched are accepted, with every command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 2 bad arguments or data, 1 anything else."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand where the cursor is
        from lit_edit.cli.completion import complete_line

        return complete_line()
    args = list(sys.argv[1:] if argv is None else argv)
    if ACCEPT in args:  # of any command that may fetch a model, and of the processes that it starts
        args = [word for word in args if word != ACCEPT]
        os.environ["LIT_EDIT_ACCEPT_LICENCE"] = "all"
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if args else 2
    name = "version" if args[0] in ("--version", "-V") else args[0]
    command = BY_NAME.get(name)
    if command is None:
        meant = did_you_mean(name, BY_NAME).removeprefix("; ")
        return _fail(f"unknown command {name!r}; {meant}{' ' if meant else ''}lit-edit --help lists all", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin long while they wait make everything several times slower as soon as another program wants a
    # core; this short costs nothing on a quiet machine. Read by GNU OpenMP when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Compiled matrix products are kept by shape, and here every pass has another: hundreds of megabytes for nothing.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    show_messages()
    try:
        return command.load()(args[1:]) or 0
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


def _fail(error: Exception | str, status: int) -> int:
    text = f"lit-edit: error: {error}"
    if (progress := sys.modules.get("tqdm")) is not None:  # above a bar that is still shown, not behind it
        progress.tqdm.write(text, file=sys.stderr)
    else:
        sys.stderr.write(f"{text}\n")
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
