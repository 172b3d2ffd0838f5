"""selftest: every kernel that this machine can run, against the reference, in seconds.

An installation can be whole and still compute wrongly on one processor: a kernel set that nobody could try, a driver, a
compiler. So a network small enough for a moment runs here in every way that is present:

    CPU    every kernel set of the native module x every engine that can be asked for; a network as one native call and
           as operators, one by one
    GPU    every backend that can run, where torch sees a device

and each answer must have the bytes of plain torch (operators/reference.py), spikes and logits alike. The network holds
one of each kind of layer. Its widths are odd, so vectors end in the middle. Its weights and thresholds lie on a coarse
grid, so membranes meet thresholds exactly and >= differs from >. Silence would agree with anything: the test fails if
its own neurons do not fire.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..backend import native
from ..backend.choice import GPU_ORDER
from ..conversion.builder import convert
from ..model.qcfs import QCFS
from ..network.executor import NATIVE
from ..network.recording import trace
from ..network.snn import SNN

ENGINES = tuple(e for e in backend.ENGINES if e != "auto")
SETTINGS = ((16, "plain"), (8, "plain"), (24, "plain"), (16, "offset"), (16, "signed"), (16, "sum"))
T = 9  # more than a byte of spikes
LEAST_RATE, LARGEST_RATE = 0.05, 0.95


class _Network(nn.Module):
    """A convolution of the image, a depthwise one, a residual block, a pool, a strided one, linear layers."""

    def __init__(self, width: int = 19) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), QCFS(4))
        self.depthwise = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), QCFS(4))
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.join = QCFS(4)
        self.pool = nn.AvgPool2d(2)
        self.wide = nn.Sequential(nn.Conv2d(width, 35, 3, 2, 1), QCFS(4), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(35 * 4, 67), QCFS(4))
        self.last = nn.Linear(67, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x))
        x = self.pool(self.join(self.block(x) + x))
        return self.last(self.hidden(self.wide(x)))


def network() -> nn.Module:
    """The network, with random weights on a grid of eighths; always the same."""
    g = torch.Generator().manual_seed(3)
    model = _Network()
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            reach = max(1, round(16 / m.weight[0].numel() ** 0.5))
            m.weight.data = torch.randint(-reach, reach + 1, m.weight.shape, generator=g) / 8
            assert m.bias is not None
            m.bias.data = torch.randint(-1, 3, m.bias.shape, generator=g) / 8
        if isinstance(m, QCFS):
            m.thresh.data = torch.ones_like(m.thresh)
    return model.eval()


def images() -> Tensor:
    """Two images, on a grid of eighths."""
    x = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(4))
    return torch.round(x.clamp(-2, 2) * 8) / 8


@dataclass(frozen=True)
class Check:
    """What one way of running gave.

    Attributes:
        name: of the way.
        compared: answers that were compared.
        faults: what was wrong, a sentence each.
    """

    name: str
    compared: int
    faults: tuple[str, ...]


def checks() -> Iterator[Check]:
    """Runs each way in turn and tells what it gave.

    Raises:
        RuntimeError: the test's own neurons are silent or fire always, so it would prove nothing.
    """
    model, x = network(), images()
    cases = [
        (f"{bits} bits, {mode}", convert(model, T=T, weight_bits=bits, neuron=mode, progress=False))
        for bits, mode in SETTINGS
    ]
    with backend.force(reference=True):
        wanted = [_answers(snn, x) for _, snn in cases]
    _check_rates(wanted[0])
    if native.module is None:
        yield Check("cpu", 0, (f"the native module cannot be loaded: {native.error}",))
    for name, setting, device in _ways():
        faults, compared = [], 0
        for (case, snn), want in zip(cases, wanted, strict=True):
            try:
                with setting():
                    got = _answers(snn.to(device), x.to(device))
            except Exception as error:  # whatever it is, the others are still worth a look
                faults.append(f"{case}: {type(error).__name__}: {error}")
                continue
            faults += [f"{case}: {fault}" for fault in _differences(got, want)]
            if device == "cpu" and snn._executor.path != NATIVE:
                faults.append(f"{case}: the native executor was not used ({snn._executor.path})")
            compared += len(want)
        yield Check(name, compared, tuple(faults))
    for _, snn in cases:
        snn.to("cpu")


def _ways() -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]], str]]:
    """Name, setting and device of each way to run."""
    for isa, mask in backend.kernel_sets():
        for engine in ("auto", *ENGINES):
            setting = partial(backend.force, isa_mask=mask, cpu_engine=engine, reference=False, gpu="auto")
            yield f"cpu {isa}, {engine}", setting, "cpu"
    if torch.cuda.is_available():
        for gpu in GPU_ORDER:
            if not backend.absence[gpu]():
                yield f"gpu {gpu}", partial(backend.force, gpu=gpu), "cuda"


def _answers(snn: SNN, x: Tensor) -> dict[str, Tensor]:
    """Spikes of each layer, by operators, and logits by whichever way a call takes."""
    found = {f"spikes of {name}": spikes for name, spikes in trace(snn, x).items()}
    found["logits"] = snn(x)
    return {name: value.cpu() for name, value in found.items()}


def _differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    if list(got) != list(want):
        return [f"it has {list(got)}, not {list(want)}"]
    return [
        f"{name}: {int((got[name] != want[name]).sum())} of {want[name].numel()} differ"
        for name in want
        if not torch.equal(got[name], want[name])
    ]


def _check_rates(answers: dict[str, Tensor]) -> None:
    for name, spikes in answers.items():
        rate = float(spikes.float().mean())
        if name != "logits" and not LEAST_RATE < rate < LARGEST_RATE:
            raise RuntimeError(f"selftest: {name} have a rate of {rate:.3f}, which proves nothing")


def selftest(tell: Callable[[str], Any] = print) -> bool:
    """Run all checks and tell of each; whether all of them passed.

    Args:
        tell: gets the lines, each of at most 80 columns.
    """
    passed, compared, ways = True, 0, 0
    for check in checks():
        tell(f"{check.name:26}{check.compared:4} answers {'as the reference' if not check.faults else 'FAILED'}")
        for fault in check.faults:
            tell(textwrap.fill(fault, 80, initial_indent="    ", subsequent_indent="    "))
        passed, compared, ways = passed and not check.faults, compared + check.compared, ways + 1
    for gpu in GPU_ORDER[:-1]:
        if reason := _not_run(gpu):
            tell(textwrap.fill(f"{gpu} not run: {reason}", 80, subsequent_indent="    "))
    tell(f"SUCCESS: {compared} answers, {ways} ways, every byte as the reference" if passed else "FAILURE: see above")
    return passed


def _not_run(gpu: str) -> str:
    return backend.absence[gpu]() or ("" if torch.cuda.is_available() else "torch sees no GPU")
