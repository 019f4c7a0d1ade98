"""The version of the package, in a module of its own: importing the package would load much more."""

__version__ = "0.1.0"
