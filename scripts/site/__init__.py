"""The documentation site: what mkdocs cannot take from docs/ alone. `make docs` builds it."""
