"""Paths, files that are written whole or not at all, checksums, and Ctrl-C at a safe moment."""
