"""Builds the parts of the documentation site that are not files in docs/. `make docs` builds the site."""
