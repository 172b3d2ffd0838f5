"""Every number that bounds what the integer kernels take, and why; and the bound on T that follows from them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# A 16-bit weight is computed as two signed digits of base 256, each an int8 with |digit| <= 127: 127 * 256 + 127.
MAX_WEIGHT = 32639
# An 8-bit weight is the upper of the two digits alone.
MAX_BYTE_WEIGHT = 127
# Membranes and currents are int32.
MAX_SUM = 2**31 - 1
# A threshold in units. float32, in which most thresholds were trained, tells no finer ones apart.
MAX_THRESHOLD = 2**24
# A count plane stores one byte for each neuron and step.
MAX_COUNT = 255
# The C++ kernels hold the operands of a layer's inputs, and those of its residuals, in arrays of this length.
MAX_SOURCES = 64
# Inputs of an image row times T on the CPU. List offsets are uint32, and padding lists to multiples of four can use
# five entries for an input: 5 * 2**29 < 2**32.
MAX_LISTED = 2**29
# An analog current beside spikes is clipped at this many thresholds, so that it has a share in the bound on T below.
ANALOG_RANGE = 64


def overflow_free_steps(
    threshold: np.ndarray, bias: np.ndarray, sources: Iterable[tuple[np.ndarray, int]], analog: bool
) -> int:
    """The largest T for which no membrane of a layer can leave 32 bits, whatever its inputs.

    A membrane starts at half its threshold n, and a step adds at most the sum of all magnitudes:

        n/2 + T * (|bias| + sum over sources of peak * sum_k |w_k| + analog range) <= 2^31 - 1

    Firing subtracts n from a membrane of at least n, so it brings no membrane farther from zero.

    Args:
        threshold, bias: in units, [O].
        sources: weights in units [K, O], or amplitudes [O], each with the largest integer (peak) that meets it.
        analog: whether an analog current adds to the sum.
    """
    n = threshold.astype(np.int64)
    current = np.abs(bias.astype(np.int64))
    for weight, peak in sources:
        current += np.abs(weight.astype(np.int64)).reshape(-1, n.size).sum(0) * peak
    if analog:
        current += ANALOG_RANGE * n
    return int(np.min((MAX_SUM - n // 2) // np.maximum(current, 1)))
