"""Tokens, and rows of tokens of like length."""
