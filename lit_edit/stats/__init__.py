"""Second moments of the keys, and the text they come from."""
