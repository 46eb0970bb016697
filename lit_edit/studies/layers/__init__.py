"""Which layers to edit on a model that nobody has tuned: found by making edits and measuring them."""
