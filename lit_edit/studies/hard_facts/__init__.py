"""Single edits that break a model."""
