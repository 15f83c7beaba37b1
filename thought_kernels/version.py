"""The version, which patches and reports remember; a module of its own, so that they need not import the package."""

__version__ = "0.1.0"
