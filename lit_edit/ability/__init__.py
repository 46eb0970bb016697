"""General ability: few-shot tasks that have nothing to do with the edits, measured before and after them."""
