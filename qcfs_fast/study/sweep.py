"""study: what one trained network is worth as a spiking network, by T, by mode of its neurons and by bits of weights.

    ANN      right answers in float32, and in bfloat16 where the processor has it; agreement is with its float32 labels
    cells    for each mode and number of bits: one conversion, all images, right answers and agreement by T
    firing   rate and synaptic operations by T, on the first images
    latency  seconds a call by T beside the ANN's forms and the step loop, in turns (benchmark/measure.py)

Every part is written to results.json as soon as it is done, so that an interrupted study goes on where it was. Then the
table, the plots and one HTML page are drawn from that file alone (sweep_page.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..conversion.builder import convert
from ..errors import ConversionError
from ..files import read_json, update_json
from ..model.tracing import symbolic_trace
from ..network.snn import SNN
from ..operators.neuron import Neuron
from .benchmark.contenders import Contenders
from .benchmark.measure import Clock, Effort, machine, take_turns
from .data import Dataset, batches, check_labels
from .trained import Trained

FORMAT = "qcfs_fast study 1"
KIND = "result of a study"  # as errors call its file


@dataclass(frozen=True)
class Plan:
    """What to find out.

    steps: the T. neurons: the modes. bits: of the weights. images: at most so many test images (None: all).
    rounding: training images on which 8-bit weights are rounded (0: each to the nearest). firing: images on which rates
    and operations are counted. latency: batch sizes of calls to time (none: nothing is timed). compiled: time
    torch.compile's forms of the ANN and of the step loop as well.
    """

    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    neurons: tuple[Neuron, ...] = (Neuron(),)
    bits: tuple[int, ...] = (16,)
    images: int | None = None
    rounding: int = 512
    firing: int = 200
    latency: tuple[int, ...] = (1,)
    compiled: bool = True


def interval(right: int, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (E. B. Wilson, J. American Statistical Association 22, 1927)."""
    z, share = 1.959964, right / images
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return middle - half, middle + half


def cell_name(neuron: Neuron, bits: int) -> str:
    return f"{neuron}, {bits} bits"


class Study:
    """One study and its results, in the folder `output`."""

    def __init__(
        self,
        model: nn.Module,
        about: Trained,
        tests: Dataset,
        training: Dataset | None,
        plan: Plan,
        output: Path,
        batch: int = 100,
        progress: bool = True,
    ) -> None:
        if tests.steps is not None or not tests.labelled or len(tests) == 0:
            raise ValueError(f"study: {tests.path} must hold labelled images that do not change with time")
        if 8 in plan.bits and plan.rounding and training is None:
            raise ValueError("study: rounding to 8 bits needs training images; give them, or rounding=0")
        self.model, self.tests, self.training, self.plan = model.eval(), tests, training, plan
        self.batch, self.progress = batch, progress
        self.images = len(tests) if plan.images is None else min(plan.images, len(tests))
        self.path = output / "results.json"
        output.mkdir(parents=True, exist_ok=True)
        subject = {
            "format": FORMAT,
            "network": about.facts(),
            "weights": _fingerprint(model),
            "data": str(tests.path.name),
            "images": self.images,
            "steps": sorted(plan.steps),
            "rounding": plan.rounding,
        }
        self.results: dict[str, Any] = {**json.loads(json.dumps(subject)), "ann": {}, "cells": {}, "latency": {}}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        kept = read_json(self.path, KIND, self._is_kept)
        differing = [k for k, v in self.results.items() if not isinstance(v, dict) and kept[k] != v]
        differing += [k for k in ("network",) if kept[k] != self.results[k]]
        if differing:
            raise ValueError(
                f"{self.path}: belongs to a study with another {', '.join(differing)}; give another folder"
            )
        self.results = kept

    def _is_kept(self, found: Any) -> bool:
        parts = [found[name] for name in ("cells", "latency")]
        objects = [*parts, *(value for part in parts for value in part.values())]
        return self.results.keys() <= found.keys() and all(isinstance(value, dict) for value in objects)

    def forget_latency(self) -> None:
        """Time everything again, on this machine; right answers and rates are the same on all, and stay."""
        self.results["latency"] = {}

    def _write(self) -> None:
        """All that was found, and the cells that another process found meanwhile."""
        ours = self.results
        self.results = update_json(
            self.path, lambda there: {**ours, "cells": {**(there or ours)["cells"], **ours["cells"]}}
        )

    def run(self) -> dict[str, Any]:
        """Do what is missing; returns the results."""
        labels, found = self._ann()
        for bits in self.plan.bits:
            for neuron in self.plan.neurons:
                name = cell_name(neuron, bits)
                if name not in self.results["cells"]:
                    self.results["cells"][name] = self._cell(neuron, bits, labels, found)
                    self._write()
        for size in self.plan.latency:
            if str(size) not in self.results["latency"]:
                self.results["latency"][str(size)] = self._latency(size)
                self._write()
        return self.results

    def _batches(self, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        count = -(-self.images // self.batch)
        every = batches(self.tests, self.batch, self.images)
        return iter(tqdm(every, description, total=count, unit="batch", leave=False, disable=not self.progress))

    def _ann(self) -> tuple[Tensor, Tensor]:
        """The images' labels, and those the ANN gives in float32."""
        forms = {"fp32": None, **({"bf16": torch.bfloat16} if _has_bfloat16() else {})}
        answers: dict[str, list[Tensor]] = {name: [] for name in forms}
        labels = []
        with torch.no_grad():
            for x, y in self._batches("ANN"):
                labels.append(y)
                for name, dtype in forms.items():
                    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                        scores = self.model(x)
                    check_labels(y, scores.shape[1], str(self.tests.path))
                    answers[name].append(scores.argmax(1))
        found = {name: torch.cat(parts) for name, parts in answers.items()}
        truth = torch.cat(labels)
        self.results["ann"] = {
            name: {"right": int((f == truth).sum()), "agree": int((f == found["fp32"]).sum())}
            for name, f in found.items()
        }
        self._write()
        return truth, found["fp32"]

    def _converted(self, neuron: Neuron, bits: int) -> SNN:
        data = None
        if bits == 8 and self.plan.rounding and self.training is not None:
            data = batches(self.training, 64, self.plan.rounding)
        steps = max(self.plan.steps)
        shape = self.tests.batch(range(1))[0].shape[1:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert(
                self.model, T=min(4, steps), weight_bits=bits, max_T=steps, input_shape=list(shape), neuron=neuron,
                data=data, progress=self.progress,
            )  # fmt: skip

    def _cell(self, neuron: Neuron, bits: int, labels: Tensor, ann: Tensor) -> dict[str, Any]:
        """Right answers, agreement with the ANN, firing and operations by T; or why there are none."""
        from .profiling.measure import profile

        try:
            snn = self._converted(neuron, bits)
        except ConversionError as error:
            return {"neuron": str(neuron), "mode": neuron.mode, "bits": bits, "error": str(error)}
        steps = sorted(self.plan.steps)
        right, agree, done = [0] * len(steps), [0] * len(steps), 0
        for x, y in self._batches(cell_name(neuron, bits)):
            expected = ann[done : done + len(y)]
            for i, answer in enumerate(answers_by_steps(snn, x, steps)):
                right[i] += int((answer == y).sum())
                agree[i] += int((answer == expected).sum())
            done += len(y)
        totals = [
            profile(snn, batches(self.tests, min(self.batch, 50), self.plan.firing), T, progress=False).totals
            for T in tqdm(steps, "firing", leave=False, disable=not self.progress)
        ]
        return {
            "neuron": str(neuron),
            "mode": neuron.mode,
            "bits": bits,
            "right": right,
            "agree": agree,
            "rate": [t["rate"] for t in totals],
            "accumulates": [t["accumulates_per_image"] for t in totals],
            "multiply_accumulates": [t["multiply_accumulates_per_image"] for t in totals],
        }

    def _latency(self, size: int) -> dict[str, Any]:
        """Median seconds per image of every cell and T, and of the ANN's forms and the step loop, in turns."""
        x = self.tests.batch(range(size))[0]
        cells = [(n, b) for b in self.plan.bits for n in self.plan.neurons]
        snns = {
            cell_name(n, b): self._converted(n, b)
            for n, b in cells
            if "error" not in self.results["cells"][cell_name(n, b)]
        }
        made = Contenders(symbolic_trace(self.model), snns, x, self.plan.compiled)
        calls: dict[str, Callable[[], Any]] = {}
        for name, call in made.calls.items():
            if name.startswith("ANN QCFS") and name.split()[2] in self.results["ann"]:
                calls[name] = partial(call, 1)
            elif name in snns or name.startswith("T-loop fp32"):
                calls |= {f"{name}, T = {T}": partial(call, T) for T in sorted(self.plan.steps)}
        with torch.no_grad():
            seconds, errors = take_turns(
                calls, Effort(rounds=31, seconds=2.0, min_rounds=5, reading=1e-3), Clock(x.device)
            )
        return {
            "machine": machine(x.device),
            "seconds": {name: sorted(found)[len(found) // 2] / size for name, found in seconds.items()},
            "errors": {name: str(error) for name, error in errors.items()} | made.errors,
        }


def answers_by_steps(snn: SNN, x: Tensor, steps: Sequence[int]) -> Iterator[Tensor]:
    """The labels after each T, in one run of the largest; sum mode takes one for each T."""
    if snn.neuron.mode == "sum":
        for T in steps:
            yield snn(x, T).argmax(1)
        return
    running = snn(x, snn.neuron.steps(max(steps)), per_step=True)
    for T in steps:
        yield running[T - 1].argmax(1)


def _has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; where it does not, that form is emulated and worth no figure."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _fingerprint(model: nn.Module) -> str:
    """A checksum of all tensors of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
