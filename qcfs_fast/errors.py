"""Exceptions of the package."""


class ConversionError(ValueError):
    """A model, or a part of it, has no exact spiking counterpart; the message names the part and the remedy."""


class FormatError(ValueError):
    """A saved network is damaged, or was written by a version this one does not know."""
