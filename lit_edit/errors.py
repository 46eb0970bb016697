"""Errors that are the user's to mend: the command line shows their message alone and ends with status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Arguments, data or a model that cannot be used; the message says what to do."""


class RunStoppedError(RuntimeError):
    """A run that could not go on; the message says why and how it goes on. The command line ends with status 1."""


class ArgumentError(UserError):
    """A setting that does not fit the model or another setting."""
