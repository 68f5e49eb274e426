"""The version, which modules that the package's root imports ask for as well."""

__version__ = "0.1.0"
