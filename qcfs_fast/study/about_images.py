"""What a network's file says of the images that the network was trained on, in its metadata (docs/format.md).

    classes     names in the order of the outputs; a folder of images is numbered by them
    mean, std   one number, or one per channel: pixels from 0 to 1 enter as (pixel - mean) / std

Anyone can write anything there. So each is checked where it is used, and what a command line replaces is not asked.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..network.schema import require
from ..network.snn import SNN
from .data import Dataset


def checked_classes(values: Any, outputs: int) -> list[str]:
    """Class names; FormatError unless there are as many as outputs, all different."""
    names = isinstance(values, list | tuple) and all(isinstance(v, str) and v for v in values)
    fits = names and len(values) == len(set(values)) == outputs
    count = f"{len(values)}: " if names else ""
    require(fits, f"classes must be {outputs} different names, one per output, got {count}{reprlib.repr(values)}")
    return list(values)


def checked_numbers(name: str, values: Any, channels: int) -> list[float] | None:
    """The "mean" or the "std" of channels; FormatError unless they can be computed with. None where nothing is said."""
    if values is None:
        return None
    least = 1e-30 if name == "std" else -1e30
    fits = isinstance(values, list | tuple) and len(values) in (1, channels)
    fits = fits and all(isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= 1e30 for v in values)
    kind = "positive number" if name == "std" else "number"
    require(fits, f"{name} must be one {kind} per channel, {channels} or 1 for all, got {reprlib.repr(values)}")
    return [float(v) for v in values]


def outputs_of(snn: SNN) -> int:
    """How many classes a network tells apart."""
    snn.refuse_several_outputs("a list of classes")
    return int(snn.layers[snn._readouts[0]].offset.numel())


def stored(snn: SNN, file: Path, name: str) -> list[Any] | None:
    """The "classes", "mean" or "std" of a saved network; None where its file does not say."""
    values = snn.metadata.get(name)
    try:
        if name == "classes":
            return None if values is None else checked_classes(values, outputs_of(snn))
        return checked_numbers(name, values, snn.layers["input"].config.channels)
    except FormatError as error:
        raise FormatError(f"{file}: in its metadata, {error}; mend snn.metadata and save it anew") from error


def normalise(
    data: Dataset, snn: SNN, file: Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> None:
    """Normalise images as asked, or as the network's file says, or else as the data does itself."""
    if data.steps is None:  # images over time are used as they are
        data.mean = mean or stored(snn, file, "mean") or data.mean
        data.std = std or stored(snn, file, "std") or data.std
