"""Taking edits away: a model, a delta, a LoRA adapter."""
