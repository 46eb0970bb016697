"""Least squares over facts: recursive, in float64, and the formulas behind it."""
