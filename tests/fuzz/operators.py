"""Calls of operators as nobody should make them: every integer at the powers of two, every tensor in odd forms.

A case is a small sound call of a random operator with up to three of its operands altered. The native kernels must
refuse it by a Python exception, or answer as the reference does, bit for bit. Where an operand's values are outside of
the operators' contract (a threshold of 0), or the reference would run too long, an answer is all that is asked.
"""

import math

import numpy as np
import torch

from qcfs_fast import backend
from qcfs_fast.operators.masks import planes
from qcfs_fast.operators.neuron import MODES
from qcfs_fast.operators.signature import OPERATORS

from .harness import SANITIZED

KINDS = {kind.name: kind for kind in OPERATORS}
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, MemoryError)
POWERS = sorted({sign * 2**k + d for k in range(64) for d in (-1, 0, 1) for sign in (1, -1)})
POWERS = [v for v in POWERS if -(2**63) <= v < 2**63]
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool)
FACTORS = ("scale", "multiple")  # with large ones sums leave 32 bits
TOO_LARGE = 2**33  # elements that the memory of a test never holds: asking for them must be refused
TOO_MUCH = 2**26  # elements of an operand: copies of it would take seconds
TOO_LONG = 300_000  # elements beyond which a case is not run


def whole(rng, low, high, shape, dtype):
    return torch.from_numpy(rng.integers(low, high, shape, endpoint=True)).to(dtype)


def spikes(rng, T, *shape):
    counts = T == 1 or rng.random() < 0.3
    return whole(rng, 0, 255 if counts and rng.random() < 0.3 else 1, (T if counts else planes(T), *shape), torch.uint8)


def geometry(rng, groups):
    k, s, p, d = (rng.integers(low, high, 2, endpoint=True) for low, high in ((1, 3), (1, 3), (0, 2), (1, 2)))
    return [int(v) for v in (*k, *s, *p, *d, groups)]


def outputs(size, g, axis):
    k, s, p, d = g[axis:8:2]
    return (size + 2 * p - d * (k - 1) - 1) // s + 1


def layer(rng, linear, going_on):
    """Operands of conv2d_if, linear_if and those that go on."""
    T, N, O = int(rng.integers(1, 20)), int(rng.integers(0, 3)), int(rng.integers(1, 70))
    groups = 1 if linear or rng.random() < 0.7 else int(rng.choice([2, 3]))
    O *= groups
    mode = int(rng.choice([0, 3] if going_on else range(5)))
    if mode == 4:
        T = 1
    window = int(rng.integers(1, min(T, 8) + 1))
    neuron = {1: [1, window, int(rng.integers(1, 4))], 2: [2, window, 1], 4: [4, int(rng.integers(1, 30)), 0]}.get(
        mode, [mode, 0, 0]
    )
    while True:
        h, w, g = int(rng.integers(1, 7)), int(rng.integers(1, 7)), geometry(rng, groups)
        oh, ow = outputs(h, g, 0), outputs(w, g, 1)
        if oh > 0 and ow > 0:
            break
    dtype = [torch.int8, torch.int16][rng.integers(2)]
    x, weight, sources = [], [], int(rng.integers(0, 3))
    for _ in range(sources):
        c = groups * int(rng.integers(1, 20))
        x.append(spikes(rng, T, N, c) if linear else spikes(rng, T, N, h, w, c))
        weight.append(whole(rng, -100, 100, (c, O) if linear else (*g[:2], c // groups, O), dtype))
    maps = (N, O) if linear else (N, oh, ow, O)
    residual = [spikes(rng, T, *maps) for _ in range(rng.integers(0, 3))]
    current = None
    if rng.random() < 0.3 or not (x or residual):
        current = whole(rng, -500, 500, maps if rng.random() < 0.5 else (T, *maps), torch.int32)
    operands = {
        "x": x,
        "weight": weight,
        **({} if linear else {"geometry": g * sources}),
        "residual": residual,
        "amplitude": [whole(rng, -200, 200, (O,), torch.int32) for _ in residual],
        "current": current,
        "bias": whole(rng, -90, 90, (O,) if rng.random() < 0.7 else (T, O), torch.int32),
        "threshold": 2 * whole(rng, 1, 4000, (O,), torch.int32),
        "T": T,
        "scale": [],
        "neuron": neuron,
    }
    if going_on:
        rows = 2 if MODES[mode] == "signed" else 1
        operands["state"] = None if rng.random() < 0.3 else whole(rng, -900, 900, (rows, *maps), torch.int32)
    return operands


def image(rng, encode):
    groups = int(rng.choice([1, 1, 2]))
    c, O = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 40))
    while True:
        h, w, g = int(rng.integers(1, 7)), int(rng.integers(1, 7)), geometry(rng, groups)
        if outputs(h, g, 0) > 0 and outputs(w, g, 1) > 0:
            break
    N = int(rng.integers(0, 3))
    threshold = 2 * whole(rng, 1, 4000, (O,), torch.int32)
    low, high = (torch.zeros_like(threshold), threshold) if encode else (-threshold, threshold // 2)
    if not encode and rng.random() < 0.2:
        low, high = high, low  # they cross
    return {
        "x": whole(rng, -(2**15), 2**15, (N, h, w, c), torch.int32),
        "exponent": whole(rng, -20, 2, (N,), torch.int32),
        "weight": whole(rng, -32639, 32639, (*g[:2], c // groups, O), torch.int16),
        "geometry": g,
        "gain": torch.from_numpy(rng.standard_normal(O)) / 1000,
        "offset": torch.from_numpy(rng.standard_normal(O)) * 100,
        "low": low,
        "high": high,
        **({"threshold": threshold, "T": int(rng.integers(1, 20))} if encode else {}),
    }


def windows(rng, size):
    found = []
    for _ in range(rng.integers(1, 4)):
        first = int(rng.integers(0, size))
        found += [first, int(rng.integers(first, size + 1)), int(rng.choice([1, 2, 4]))]
    return found


def pool(rng, name):
    T, n, h, w, c = (int(rng.integers(low, high)) for low, high in ((1, 12), (0, 3), (1, 6), (1, 6), (1, 70)))
    rows, cols = {"rows": windows(rng, h)}, {"cols": windows(rng, w)}
    if name == "pool_counts":
        counts = whole(rng, -1000, 1000, (T, n, h, w, c), torch.int32)
        return {"counts": counts, **rows, **cols, "multiple": int(rng.choice([0, 16]))}
    if name == "max_pool":
        return {"x": whole(rng, 0, 255, (T, n, h, w, c), torch.uint8), **rows, **cols, "counts": rng.random() < 0.5}
    x = whole(rng, 0, 1, (T, n, h, w, c), torch.uint8) if rng.random() < 0.5 else spikes(rng, T, n, h, w, c)
    return {"x": x, **rows, **cols, "multiple": int(rng.choice([0, 16])), "T": T}


def readout(rng):
    T, n, O = int(rng.integers(1, 6)), int(rng.integers(0, 3)), int(rng.integers(1, 20))
    S, terms = int(rng.choice([1, T])), int(rng.integers(1, 3))
    h, w = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    found = {"counts": [], "weight": [], "geometry": [], "gain": [], "multiple": []}
    for _ in range(terms):
        identity = rng.random() < 0.3
        c = O if identity else int(rng.integers(1, 20))
        found["counts"].append(whole(rng, 0, 9, (S, n, h, w, c), torch.int32))
        found["weight"].append(whole(rng, -999, 999, (0,) if identity else (1, 1, c, O), torch.int16))
        found["geometry"] += [1, 1, 1, 1, 0, 0, 1, 1, 1]
        found["gain"].append(torch.from_numpy(rng.standard_normal(O)))
        found["multiple"].append(int(rng.integers(1, 10)))
    return {**found, "offset": torch.from_numpy(rng.standard_normal(O)), "T": T}


def sound(rng, name):
    """The operands of a sound call, by name."""
    if name == "quantize_input":
        n, c, h, w = (int(rng.integers(low, 7)) for low in (0, 1, 1, 1))
        C = int(rng.integers(1, 7))
        x = torch.from_numpy(rng.standard_normal((n, c, h, w)))
        x = x.to([torch.float32, torch.float64, torch.float16, torch.bfloat16][rng.integers(4)])
        scale, shift = (torch.from_numpy(rng.standard_normal(C)).to(torch.float32) for _ in range(2))
        bits = int(rng.integers(2, 25))
        return {"x": x, "source": whole(rng, 0, c - 1, (C,), torch.int64), "scale": scale, "shift": shift, "bits": bits}
    if name.startswith(("conv2d_if", "linear_if")):
        return layer(rng, name.startswith("linear"), name.endswith("from"))
    if name in ("conv2d_current", "conv2d_encode"):
        return image(rng, name == "conv2d_encode")
    if name == "count":
        T = int(rng.integers(1, 20))
        first = int(rng.integers(0, T))
        span = [] if rng.random() < 0.5 else [first, int(rng.integers(first + 1, T + 1))]
        shape = [int(s) for s in rng.integers(0, 6, rng.integers(1, 5))]
        return {"x": spikes(rng, T, *shape), "T": T, "prefix": rng.random() < 0.5, "span": span}
    return readout(rng) if name == "readout" else pool(rng, name)


def strided(t):
    """The same values in another order of memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else torch.stack([t, t], -1)[..., 0]


def misaligned(t):
    """The same values one byte, or one element, behind the beginning of their memory."""
    offset = 1 if t.element_size() == 1 else t.element_size()
    memory = torch.zeros(t.numel() * t.element_size() + offset, dtype=torch.uint8)
    view = memory[offset:].view(t.dtype).view(t.shape)
    view.copy_(t)
    return view


def resized(rng, t):
    """One size altered: zero, one more, or as large as no memory is."""
    shape = list(t.shape) or [1]
    shape[rng.integers(len(shape))] = int(rng.choice([0, 1, 2, 3, 17, 2**20, 2**31, 2**40]))
    if math.prod(max(1, s) for s in shape) >= 2**60:  # altered twice: torch itself has no such tensor
        return t
    return (
        torch.zeros((), dtype=t.dtype).expand(shape) if math.prod(shape) > 10**5 else torch.ones(shape, dtype=t.dtype)
    )


def altered_tensor(rng, t):
    """Another tensor in this one's place; and whether its values are still those of the contract."""
    way = int(rng.integers(9))
    if t.numel() > TOO_LONG:  # one that was altered before
        return t, False
    if way < 3:
        return [strided, misaligned, lambda t: t.flip(-1).flip(-1)][way](t) if t.dim() else t, True
    if way == 3:
        return t.to(DTYPES[rng.integers(len(DTYPES))]), True
    if way == 4:
        return t.unsqueeze(int(rng.integers(t.dim() + 1))), True
    if way == 5:
        return (t[0] if t.dim() and t.shape[0] else t.reshape(-1)), True
    if way < 8:
        return resized(rng, t), False
    if t.dtype in (torch.int32, torch.float64, torch.float32, torch.int64):
        limits = torch.iinfo(t.dtype) if not t.is_floating_point() else None
        values = [limits.min, -1, 0, 1, limits.max] if limits else [0.0, -0.0, 1e30, 1e-40]
        return torch.full_like(t, values[rng.integers(len(values))]), False
    return t[..., :0], False


def alter(rng, operands):
    """Alters one operand; returns whether the values are still those of the contract."""
    name = list(operands)[rng.integers(len(operands))]
    value = operands[name]
    power = POWERS[rng.integers(len(POWERS))]
    if isinstance(value, bool):
        operands[name] = not value
    elif isinstance(value, int):
        operands[name] = power
    elif value is None:
        operands[name] = torch.zeros(3, dtype=torch.int32)
    elif isinstance(value, torch.Tensor):
        operands[name], held = altered_tensor(rng, value)
        return held
    elif not value or rng.random() < 0.15:  # a list of another length
        operands[name] = value[:-1] if value and rng.random() < 0.5 else [*value, *(value[:1] or [power])]
    else:
        i = int(rng.integers(len(value)))
        operands[name] = list(value)
        if isinstance(value[i], int):
            operands[name][i] = power
        elif rng.random() < 0.2:
            operands[name][i] = value[0]  # two views of one storage
        else:
            operands[name][i], held = altered_tensor(rng, value[i])
            return held
    return name not in FACTORS


def outcome(call, operands):
    try:
        found = call(*operands)
    except REFUSALS as error:
        return error
    return found if isinstance(found, tuple) else (found,)


def run(seed):
    """One case: "equal", "refused", "ran" (nothing to compare with) or "skipped"; AssertionError for a wrong answer."""
    rng = np.random.default_rng(seed)
    name = list(KINDS)[rng.integers(len(KINDS))]
    operands = sound(rng, name)
    changes = int(rng.integers(0, 4))
    altered = [alter(rng, operands) for _ in range(changes)]
    return compare(name, operands, all(altered))


def most(tensors):
    return max((t.numel() for t in tensors), default=0)


def huge(t):
    """Whether sums of such values can leave 32 bits: outside of the contract, and told by the sanitizer."""
    return t.dtype == torch.int32 and 0 < t.numel() < TOO_MUCH and int(t.to(torch.int64).abs().max()) > 2**20


def compare(name, named, held=True):
    """A call with operands by name; `held`: their values are those of the contract."""
    operator, operands = getattr(torch.ops.qcfs_fast, name), list(named.values())
    try:
        shape = KINDS[name].checked(*operands).shape
    except (*REFUSALS, AttributeError) as error:  # torch itself refuses an int where a tensor is due
        if isinstance(outcome(operator, operands), REFUSALS):
            return "refused"
        raise AssertionError(f"{name} runs in spite of its checks") from error
    size = math.prod(max(1, s) for s in shape)
    given = [t for v in operands for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]
    factors = [v for key in FACTORS for v in np.ravel(named.get(key, [])) if isinstance(v, int | np.integer)]
    if size < TOO_LARGE and (size * named.get("T", 1) > TOO_LONG or TOO_MUCH < most(given) < TOO_LARGE):
        return "skipped"
    if SANITIZED and not held and (max(factors, default=1) > 256 or any(map(huge, given))):
        return "skipped"
    native = outcome(operator, operands)
    if size >= TOO_LARGE:
        return "refused" if isinstance(native, REFUSALS) else "ran"
    if not held or max(named.get("geometry", []), default=0) > 500:
        return "ran"
    with backend.force(reference=True):
        slow = outcome(operator, operands)
    if isinstance(slow, Exception) or isinstance(native, Exception):
        assert isinstance(slow, Exception) == isinstance(native, Exception), f"{name}: {native!r}, reference {slow!r}"
        return "refused"
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(native, slow, strict=True)), name
    return "equal"
