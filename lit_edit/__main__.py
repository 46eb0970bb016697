"""``python -m lit_edit`` is ``lit-edit``."""

from lit_edit.cli.main import entry

if __name__ == "__main__":
    entry()
