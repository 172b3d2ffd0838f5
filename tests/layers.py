"""Random spiking layers for differential tests: operands, the oracle's answer, and how it was reached."""

import functools
from dataclasses import dataclass

import numpy as np
import oracle
import torch

from qcfs_fast.operators.geometry import POINTWISE
from qcfs_fast.operators.neuron import MODES

ODD = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


@dataclass
class Case:
    """Arguments of torch.ops.qcfs_fast.conv2d_if (or linear_if) and what they must give."""

    args: tuple
    want: oracle.Fired

    @property
    def state(self):
        """The state before the first step, or None."""
        return self.args[-1]

    @property
    def operands(self):
        """`args` as the operator takes them."""
        return self.args if self.state is not None else self.args[:-1]

    def check(self, name):
        """The operator of this name, conv2d_if or linear_if, gives the spikes wanted, and the state if there is one."""
        if self.state is None:
            out = getattr(torch.ops.qcfs_fast, name)(*self.operands)
        else:
            out, state = getattr(torch.ops.qcfs_fast, name + "_from")(*self.args)
            assert np.array_equal(state.numpy(), self.want.state)
        assert np.array_equal(out.numpy(), self.want.masks)


def tensor(a):
    return torch.from_numpy(np.ascontiguousarray(a))


def random_spikes(rng, shape, T, count):
    """Masks or count planes [.., *shape]; sparse, as trained nets are."""
    rate = rng.choice([0.1, 0.3, 0.6])
    if count:
        return (rng.random((T, *shape)) < rate).astype(np.uint8) * rng.integers(1, 256, (T, *shape), dtype=np.uint8)
    return oracle.pack(rng.random((T, *shape)) < rate)


def random_geometry(rng, groups):
    kh, kw = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    return (
        kh, kw, int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(0, kh)), int(rng.integers(0, kw)),
        int(rng.integers(1, 3)), int(rng.integers(1, 3)), groups,
    )  # fmt: skip


def random_weights(rng, shape, bits, extreme):
    """Coarse grids, so that sums collide with thresholds; or the limits of the digits."""
    if bits == 8:
        return rng.choice([-128, 127], shape).astype(np.int8) if extreme else rng.integers(-3, 4, shape).astype(np.int8)
    if extreme:
        return rng.choice([-32639, 32639, 127, -128, 128], shape).astype(np.int16)
    return (rng.integers(-4, 5, shape) * 64).astype(np.int16)


@functools.lru_cache(maxsize=512)  # the oracle takes longer than the kernels, and all of them get the same cases
def random_case(
    seed, T=None, *, max_T=40, max_batch=3, max_channels=65, max_pixels=9, plain=False, linear=False,
    bits=None, channels=None, outputs=None, products=None, residuals=None, modes=(),
):  # fmt: skip
    """A layer with one to three products, up to two residuals, maybe a current of the image, any groups.

    The same arguments give the same tensors: who changes one, clones it before.

    What is given is not drawn: T, the bits of a weight, the number of input channels and of outputs, of products and of
    residuals. A plain layer has no groups; of a linear one the arguments are those of linear_if. With `modes` one
    of them is drawn, and maybe scales, a bias or current by step and a state.
    """
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, max_T + 1)) if T is None else T
    varied = bool(modes)  # draws that other cases do not make, which keeps theirs
    mode = str(rng.choice(modes)) if varied else "plain"
    if mode == "sum":
        T = 1
    window = min(T, int(rng.integers(1, 9))) if mode in ("offset", "masked") else 0
    iterations = int(rng.choice([1, 1, 2, 3])) if mode == "offset" else min(window, 1)
    levels = int(rng.choice([1, 2, 4, 8, 15, 255])) if mode == "sum" else 1
    bits = bits or int(rng.choice([8, 16]))
    extreme = rng.random() < 0.25
    sizes = [c for c in ODD if c <= max_channels]
    O = outputs or int(rng.choice(sizes))
    N = int(rng.integers(1, max_batch + 1))
    size = 2 + int(rng.integers(0, max_pixels - 1)), 2 + int(rng.integers(0, max_pixels - 1))
    kind = "plain" if plain or linear else rng.choice(["plain", "grouped", "depthwise"], p=[0.7, 0.15, 0.15])
    groups, C = 1, channels or int(rng.choice(sizes))
    if kind == "depthwise":
        groups = C = O
    elif kind == "grouped":
        groups = int(rng.choice([g for g in range(1, O + 1) if O % g == 0]))
        C = groups * int(rng.integers(1, 9))
    oh = ow = 0
    while oh <= 0 or ow <= 0:
        g = random_geometry(rng, groups)
        oh, ow = ((size[a] + 2 * g[4 + a] - g[6 + a] * (g[a] - 1) - 1) // g[2 + a] + 1 for a in (0, 1))
    if linear:
        g, size, oh, ow = POINTWISE, (1, 1), 1, 1
    sources = [(random_spikes(rng, (N, *size, C), T, rng.random() < (1.0 if mode == "sum" else 0.3)), g)]
    # Further products: pointwise, on maps of the output's size.
    while len(sources) < products if products else len(sources) < 3 and rng.random() < 0.3:
        x = random_spikes(rng, (N, oh, ow, int(rng.choice(sizes))), T, rng.random() < 0.3)
        sources.append((x, POINTWISE))
    summed = [(x, random_weights(rng, (g[0], g[1], x.shape[-1] // g[8], O), bits, extreme), g) for x, g in sources]
    unit = 256 if bits == 8 else 64
    added = [
        (random_spikes(rng, (N, oh, ow, O), T, rng.random() < 0.3), (rng.integers(0, 5, O) * unit).astype(np.int32))
        for _ in range(int(rng.integers(0, 3)) if residuals is None else residuals)
    ]
    by_step = [varied and mode != "sum" and rng.random() < 0.3 for _ in range(2)]  # current, bias
    shape = (T,) * by_step[0] + (N, oh, ow, O)
    constant = (rng.integers(-3, 4, shape) * unit).astype(np.int32) if rng.random() < 0.2 + 0.3 * varied else None
    bias = (rng.integers(-2, 3, (T, O) if by_step[1] else O) * unit).astype(np.int32)
    scales = None
    if varied and rng.random() < 0.5:
        masks_alone = T > 1 and all(x.shape[0] != T for x, _ in sources)  # counts would overflow
        if bits == 8 and masks_alone and not extreme and rng.random() < 0.5:  # digits of weights of 24 bits
            summed = [(x, w, g) for x, w, g in summed for _ in range(3)]
            sizes = sorted((s for _ in sources for s in (65536, 256, 1)), reverse=True)
            summed = summed[::3] + summed[1::3] + summed[2::3]
            summed = [(x, rng.integers(-2, 3, w.shape).astype(np.int8), g) for x, w, g in summed]
        else:
            sizes = [256 if bits == 8 else 1] * len(summed)
        scales = [int(s * rng.choice([-1, 1])) for s in sizes]
    total = oracle.currents(summed, added, constant, bias, T, scales, levels)
    # A threshold of the size of the currents, on their grid, makes neurons fire at some steps and tie at some.
    typical = np.abs(total).mean(axis=(0, 1, 2, 3)) / levels * rng.choice([0.5, 1.0, 2.0])
    threshold = np.maximum(2 * unit * np.rint(typical / (2 * unit)), 2 * unit).astype(np.int32)
    state = None
    if varied and mode in ("plain", "signed") and rng.random() < 0.5:
        v = rng.integers(-2, 3, (1, N, oh, ow, O)) * (threshold // 2)
        state = np.concatenate([v, rng.integers(0, 3, v.shape)])[: 1 + (mode == "signed")].astype(np.int32)
    settings = mode, levels if mode == "sum" else window, iterations
    want = (
        oracle.fire(total, threshold, *settings, state=state) if varied else oracle.integrate_and_fire(total, threshold)
    )
    x, w = [tensor(p[0]) for p in summed], [tensor(p[1]) for p in summed]
    r, amplitude = [tensor(p[0]) for p in added], [tensor(p[1]) for p in added]
    current = None if constant is None else tensor(constant)
    state = None if state is None else tensor(state)
    neuron = [MODES.index(mode), *settings[1:]]
    operands = tensor(bias), tensor(threshold), T, scales or [], neuron
    if not linear:
        return Case((x, w, [v for p in summed for v in p[2]], r, amplitude, current, *operands, state), want)
    x, r = ([t[:, :, 0, 0] for t in maps] for maps in (x, r))
    want.masks = want.masks[:, :, 0, 0]
    current, state = (None if t is None else t[..., 0, 0, :].contiguous() for t in (current, state))
    if want.state is not None:
        want.state = want.state[:, :, 0, 0]
    return Case((x, [t[0, 0] for t in w], r, amplitude, current, *operands, state), want)


class Evidence:
    """Adds up firing rates and exact hits over the cases of a test; a test of silent neurons proves nothing."""

    def __init__(self):
        self.rates, self.ties = [], 0

    def add(self, fired):
        self.rates.append(fired.rate)
        self.ties += fired.ties

    def check(self, ties=True):
        """`ties=False`: of few neurons, none may hit its threshold; other tests show exact hits."""
        rate = float(np.mean(self.rates))
        assert 0.05 < rate < 0.95, f"firing rate {rate}: the test is void"
        assert self.ties > 0 or not ties, "no membrane hit its threshold exactly: >= and > were not told apart"
