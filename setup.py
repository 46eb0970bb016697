"""Finds the packages; everything else stands in setup.cfg and pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["lit_edit", "lit_edit.*"]), "lit_edit.callbacks", "lit_edit.configs"])
