"""``python -m lit_edit`` is ``lit-edit``."""

from lit_edit.cli.main import entry

entry()
