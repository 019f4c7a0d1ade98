"""The version of the package; what reads it must not import the package itself, whose public names lead everywhere."""

__version__ = "0.1.0"
