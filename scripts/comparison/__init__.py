"""Compares this package with other implementations, in one run."""
