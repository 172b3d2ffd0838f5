"""Every number that bounds what the integer kernels take, and why; and the bound on T that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

# A 16-bit weight is computed as two signed digits of base 256, each an int8 with |digit| <= 127: 127 * 256 + 127.
MAX_WEIGHT = 32639
# An 8-bit weight is the upper of the two digits alone.
MAX_BYTE_WEIGHT = 127
# A 24-bit weight has a third digit. Lower digits may be -128, or 256 of their values would not be there.
MAX_LONG_WEIGHT = 127 * 65536 + MAX_WEIGHT
# Membranes and currents are int32.
MAX_SUM = 2**31 - 1
# A threshold in units. float32, in which most thresholds were trained, tells no finer ones apart.
MAX_THRESHOLD = 2**24
# The same with 24-bit weights, which lie far below it in wide layers and would lose bits to the limit above. Here the
# sums decide; this leaves room in an int32.
MAX_LONG_THRESHOLD = 2**30
# A count plane stores one byte for each neuron and step.
MAX_COUNT = 255
# The C++ kernels hold the operands of a layer's inputs, and those of its residuals, in arrays of this length.
MAX_SOURCES = 64
# Inputs of an image row times T on the CPU. List offsets are uint32, and padding lists to multiples of four can use
# five entries for an input: 5 * 2**29 < 2**32.
MAX_LISTED = 2**29
# An analog current beside spikes is clipped at this many thresholds, so that it has a share in the bound on T below.
ANALOG_RANGE = 64
# A layer of the image alone: its current is clipped at the first and its membrane held within the second, in thresholds
# each. With a bias of up to half a threshold their sum is below 2^31, so such a layer may run for ever. No spike of an
# image that stays the same depends on either. With changing images it takes 32 silent steps to make up for a membrane
# at the limit.
IMAGE_RANGE = 31
IMAGE_MEMBRANE = 32
MAX_IMAGE_THRESHOLD = 2**25
# Bits of a pixel, with its sign. A sum of K inputs is exact in double where IMAGE_BITS - 1 + 15 + log2(K) <= 53.
IMAGE_BITS = 24
# Kernels, strides, paddings, dilations and groups, and the sizes that a pool gives: larger ones are refused, so that
# arithmetic on them fits 64 bits (csrc/core/limits.h).
MAX_EXTENT = 2**24
# Windows of a pool along an axis: their table is made before anything runs.
MAX_POOL_WINDOWS = 2**20
# Bytes of what one node of a saved network may compute for one image of the shape that its file states, so that a small
# file cannot ask for all memory: masks of eight steps for 2048 x 2048 pixels of 64 channels take a sixteenth of it.
MAX_STATED = 2**32
# Bytes of all spikes that wait for their readers at the same time, in the same run: what keeps a file from asking for
# its largest result a thousand times over.
MAX_HELD = 2**34
# Elements of a tensor, an empty batch counted as one sample: four times what the largest GPU holds in int32.
MAX_ELEMENTS = 2**37
# Integers that double holds: the divisors of a readout.
MAX_EXACT = 2**53
# Scales of a product: a digit of 8 bits, of a weight of 8, 16 or 24.
SCALES = (1, 256, 65536)
# Steps that a neuron in offset or masked mode looks ahead. A GPU launch covers eight.
MAX_WINDOW = 8
MAX_ITERATIONS = 8
# Entries of a weight that a calculation copies at once.
CHUNK = 2**22


def row_blocks(matrix: np.ndarray) -> Iterator[slice]:
    """The rows of a matrix, so many at a time that copies of them stay small beside it."""
    rows = max(1, CHUNK // max(1, matrix.shape[1]))
    return (slice(k, k + rows) for k in range(0, matrix.shape[0], rows))


def overflow_free_steps(
    threshold: np.ndarray,
    bias: np.ndarray,
    sources: Iterable[tuple[np.ndarray, int]],
    analog: bool,
    look_ahead: int = 0,
    iterations: int = 0,
) -> int:
    """The largest T for which no membrane of a layer can leave 32 bits, whatever its inputs.

    A membrane starts at half its threshold n, and a step adds at most the sum M of all magnitudes:

        n/2 + T * (|bias| + sum over sources of peak * sum_k |w_k| + analog range) <= 2^31 - 1

    Firing subtracts n from a membrane of at least n (a negative spike adds it below 0), so neither brings a membrane
    farther from zero. Offset mode shifts the initial potential, at each of its iterations by at most n plus what the
    steps of the window add:

        n/2 + iterations * (n + window * M) + T * M <= 2^31 - 1

    Args:
        threshold, bias: in units, [O].
        sources: weights in units [K, O], or amplitudes [O], each with the largest integer (peak) that meets it.
        analog: whether an analog current adds to the sum.
        look_ahead, iterations: the window of offset mode, and how often its first run is made.
    """
    n = threshold.astype(np.int64)
    current = np.abs(bias.astype(np.int64))
    for weight, peak in sources:
        flat = weight.reshape(-1, n.size)
        for rows in row_blocks(flat):
            current += np.abs(flat[rows].astype(np.int64)).sum(0) * peak
    if analog:
        current += ANALOG_RANGE * n
    steps = (MAX_SUM - n // 2 - iterations * (n + look_ahead * current)) // np.maximum(current, 1)
    return max(0, int(np.min(steps)))
