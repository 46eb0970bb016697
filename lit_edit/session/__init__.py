"""A model, its ledger and its editor in Python, without a Trainer: ``lit_edit.open``, ``resume`` and ``edit``."""
