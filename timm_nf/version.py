"""The package's version, read by the build and by everything that prints it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
"""The version of the package, read by the build as well."""
