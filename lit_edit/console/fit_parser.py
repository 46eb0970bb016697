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


def decides(name: str) -> bool:
    """Tell by its name whether a setting of ``fit`` changes what comes of a run.

    Example:
        >>> decides("data.limit"), decides("run_name")
        (True, False)
    """
    return not f"{name}.".startswith(_UNCOMPARED)
