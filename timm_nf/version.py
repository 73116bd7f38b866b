"""The package's version. The build reads it from here, and so does all code that prints it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
"""The version of the package, read by the build as well."""
