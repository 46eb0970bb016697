"""Finds the packages; everything else stands in setup.cfg and pyproject.toml."""

from setuptools import find_namespace_packages, setup

# Every folder, with __init__.py or without: those of configs and templates hold data alone.
HOMES = {"lit_edit": "lit_edit", "callbacks": "lit_edit.callbacks", "configs": "lit_edit.configs"}
setup(
    packages=[
        ".".join((package, *inner))
        for folder, package in HOMES.items()
        for inner in ((), *((name,) for name in find_namespace_packages(folder, exclude=["*__pycache__*"])))
    ]
)
