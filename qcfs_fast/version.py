"""The version, in one place: read by setup, `info` and saved networks."""

__version__ = "0.1.0"
