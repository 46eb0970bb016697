"""Editors that solve a least-squares problem, and the engine that they share."""
