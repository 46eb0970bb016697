"""Editors that keep their edits beside the weights, and what they share."""
