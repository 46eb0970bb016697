"""``python -m lit_edit`` is ``lit-edit``."""

from lit_edit.cli import entry

entry()
