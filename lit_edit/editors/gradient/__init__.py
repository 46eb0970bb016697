"""Editors that learn an update by gradients, and the loop that they share."""
