"""Ranks, where algebra is done, and the memory of the host."""
