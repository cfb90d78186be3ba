"""The version of this package, for pyproject.toml and for whoever writes it down."""

__version__ = "0.1.0"
