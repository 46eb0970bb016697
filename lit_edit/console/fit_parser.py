"""The parser of ``lit-edit fit`` alone: many command lines are checked, and nothing is run."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from lit_edit.console.configs import explain
from lit_edit.console.edit_cli import EditCLI
from lit_edit.console.run_cli import argv_of
from lit_edit.console.words import expand_arguments
from lit_edit.errors import ArgumentError, UserError
from lit_edit.runs.resuming import OF_ONE_RUN
from lit_edit.runs.resuming import changes as every_change

_UNCOMPARED = tuple(
    f"{name}." for name in (*OF_ONE_RUN, "trainer.logger", "trainer.enable_progress_bar", "trainer.default_root_dir")
)


class FitParser(EditCLI):
    """Parses command lines of ``lit-edit fit`` as that command does; building it takes longer than using it."""

    def __init__(self) -> None:
        super().__init__("fit")

    def parse(self, args: list[str]) -> dict[str, Any]:
        """Return all settings that arguments of ``lit-edit fit`` lead to; :class:`ArgumentError` as there."""
        with argv_of(()):
            try:
                self.parse_arguments(self.parser, ["fit", *expand_arguments(args)])
            except argparse.ArgumentTypeError as error:
                raise ArgumentError(explain(str(error))) from None
        text = self._parser("fit").dump(self.config["fit"], skip_none=False)
        settings = yaml.safe_load(text)
        assert isinstance(settings, dict)  # noqa: S101 - for the type checker
        return settings

    def make(self, bare: bool = False) -> Any:
        """Make stream, data, callbacks and loggers (not if ``bare``) of what was parsed last, as ``fit`` does."""
        if bare:
            self.config["fit"].trainer.logger = self.config["fit"].trainer.callbacks = None
        try:
            return self.parser.instantiate_classes(self.config)["fit"]
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise ArgumentError(explain(str(error))) from error

    def _parse_only(self, subcommand: str = "") -> None:
        """Touch no run folder, leave the global random state alone, make nothing unasked, run nothing."""

    before_instantiate_classes = instantiate_classes = _set_seed = _run_subcommand = _parse_only


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ and change what comes of a run, by name.

    Example:
        >>> changes({"data": {"limit": 1}, "run_name": "a"}, {"data": {"limit": 2}, "run_name": "b"})
        {'data.limit': (1, 2)}
    """
    found = every_change(before, after)
    return {name: pair for name, pair in found.items() if not f"{name}.".startswith(_UNCOMPARED)}
