"""Exceptions of the package."""

# What a look into data of another form raises: a key that is missing, None for a list, an integer beyond all bounds.
WRONG_FORM = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ConversionError(ValueError):
    """A model, or a part of it, has no exact spiking counterpart; the message names the part and the remedy.

    Attributes:
        obstacles: where the model has several, each reason with the places it was met at.
    """

    obstacles: tuple[tuple[str, tuple[str, ...]], ...] = ()


class FormatError(ValueError):
    """A saved network is damaged, or was written by a version this one does not know."""
