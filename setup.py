"""Packaging of distseg: all of it is in pyproject.toml."""

from setuptools import setup

setup()
