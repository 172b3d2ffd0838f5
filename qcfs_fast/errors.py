"""Exceptions of the package."""


class ConversionError(ValueError):
    """A model, or a part of it, has no exact spiking counterpart; the message names the part and the remedy.

    Attributes:
        obstacles: where the model has several, each reason with the places it was met at.
    """

    obstacles: tuple[tuple[str, tuple[str, ...]], ...] = ()


class FormatError(ValueError):
    """A saved network is damaged, or was written by a version this one does not know."""
