"""The version of the package, in a module of its own because importing the package loads much more."""

__version__ = "0.1.0"
