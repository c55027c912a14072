"""The version of Fledge, as records and files name it."""

__version__ = "0.1.0"
