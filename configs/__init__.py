"""The configs that ship; `--config NAME` finds them."""
