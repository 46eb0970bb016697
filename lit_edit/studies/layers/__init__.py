"""Which layers to edit on a model that nobody has tuned: found by making edits and measuring them."""

BASE = "counterfact"
"""The config that a proposal is for; what is not the method's comes from it."""
