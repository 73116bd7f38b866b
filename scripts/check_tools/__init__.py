"""Tries the networks in other people's tools and writes docs/tools.md: `python -m scripts.check_tools`."""
