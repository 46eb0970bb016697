"""The questions of the D4S paper."""
