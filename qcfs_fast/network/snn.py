"""The converted network: a small graph of nodes (layers.py), and what runs it once for all T steps.

Each node computes all T steps before the next one starts, since a network of integrate-and-fire layers without feedback
gives the same spikes either way, and one call for all steps keeps membranes in registers. The float image is the value
IMAGE, every other value has the name of its node. On the CPU the native executor does the same in one call
(executor.py).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import choice
from ..errors import FormatError
from ..operators.limits import MAX_COUNT, MAX_SOURCES, MAX_SUM
from ..operators.neuron import Neuron
from . import anytime, saving, tail
from .executor import Executor
from .layers import IMAGE, INPUT, EncodingLayer, ImageInput, Layer, Readout, Run, SpikingLayer, Values
from .rehearsal import get_ready, rehearsed
from .schema import printable
from .stream import Stream
from .tail import checked_form


class Branch(nn.Module):
    """A level of the module tree of the model: it only holds nodes, so that print(snn) shows the names of the model."""

    def __repr__(self) -> str:
        shown = object.__new__(type(self))
        shown.__dict__.update(self.__dict__, _modules={printable(name): m for name, m in self._modules.items()})
        return nn.Module.__repr__(shown)


class SNN(Branch):
    """A spiking network that runs all T time steps of a layer in one call.

    Made by :func:`qcfs_fast.convert` or :func:`qcfs_fast.load`; has buffers only and stays in eval mode. A call
    never depends on the calls before it; :meth:`stream` gives calls that do.

    Attributes:
        T: time steps used when a call gives none; may be set up to ``max_T``.
        neuron: the mode of all neurons, a :class:`qcfs_fast.Neuron`; may be set, also by the name of a mode.
        max_T: the largest T for which no integer can overflow in this mode, whatever the input.
        weight_bits: 16, 8 or 24.
        tail: what follows the readout, such as a softmax (tail.py); () takes it away, and answers are logits. Of
            several outputs a tuple of tails.
        outputs: how several outputs are put together (tail.py); None where there is one.
        details: per spiking layer, what conversion settled (see :meth:`report`).
        metadata: what you say of the network (data set, accuracy, ...), kept in its file; values of JSON.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, Layer]],
        T: int,
        weight_bits: int,
        details: Mapping[str, Mapping[str, Any]],
        input_shape: Sequence[int] | None,
        neuron: Neuron = Neuron(),  # noqa: B008 - it is frozen
        tail: Sequence[Any] = (),
        outputs: tail.Form = None,
    ) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.details = {name: dict(d) for name, d in details.items()}
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.order = [name for name, _ in layers]
        for name, layer in layers:
            *path, leaf = name.split(".")
            parent: Any = self
            for step in path:  # not by add_module: a module may be called `predict` or `report`
                parent = parent._modules.setdefault(step, Branch())
            parent._modules[leaf] = layer
        self._program = list(layers)
        # Values that no node after this one reads; they are let go, so memory does not grow with depth.
        last_use = {source: name for name, layer in layers for source in layer.inputs}
        self._drop = {name: [s for s, last in last_use.items() if last == name] for name, _ in layers}
        self._executor = Executor()
        self._set_neuron(neuron, T)
        self._readouts = [name for name, layer in layers if isinstance(layer, Readout)]
        self.outputs = None if outputs is None else checked_form(outputs, len(self._readouts))
        self.tail = tail
        self.metadata: dict[str, Any] = {}
        self.eval()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # no attribute is a module or a tensor, and layers may have any name

    @property
    def T(self) -> int:  # noqa: N802 - the field's name
        return self._T

    @T.setter
    def T(self, value: int) -> None:  # noqa: N802
        self._T = self._checked_steps(value)

    @property
    def tail(self) -> tuple[Any, ...]:
        return self._tails if self.outputs is not None else self._tails[0]

    @tail.setter
    def tail(self, steps: Sequence[Any]) -> None:
        tails = [steps] if self.outputs is None else list(steps) or [()] * len(self._readouts)
        if len(tails) != len(self._readouts):
            raise FormatError(f"tail has {len(tails)} parts for {len(self._readouts)} outputs")
        configs: list[Any] = [self.layers[name].config for name in self._readouts]
        dims = [2 if c.vector or c.flattened else 3 if self.line else 4 for c in configs]
        self._tails = tuple(tail.checked(t, n) for t, n in zip(tails, dims, strict=True))

    @property
    def line(self) -> bool:
        """Whether images are lines [N, C, L], and all maps have one row."""
        return bool(self._program[0][1].config.line)

    def as_given(self, x: Tensor) -> Tensor:
        """Maps [.., N, C, H, W] as the model has them: lines [.., N, C, L] in a network of lines."""
        return x.squeeze(-2) if self.line and x.dim() == 5 else x

    def as_map(self, shape: Sequence[int] | None) -> tuple[int, ...] | None:
        """The shape of an image as that of a map: a line (C, L) is one of (C, 1, L)."""
        return None if shape is None else (shape[0], 1, *shape[1:]) if self.line and len(shape) == 2 else tuple(shape)

    def image_shape(self, shape: Any) -> list[int]:
        """The shape of an image as the model has it; FormatError where the network cannot run on one (rehearsal.py)."""
        return rehearsed(self._program, shape, Run(self.T, self._neuron))[0]

    def refuse_several_outputs(self, what: str) -> None:
        """ValueError where the network has several outputs, which `what` does not know."""
        if self.outputs is not None:
            raise ValueError(f"{what} takes networks with one output, and this one has {len(self._readouts)}")

    @property
    def neuron(self) -> Neuron:
        return self._neuron

    @neuron.setter
    def neuron(self, value: Neuron | str) -> None:
        self._set_neuron(value if isinstance(value, Neuron) else Neuron(value), self._T)

    def _set_neuron(self, neuron: Neuron, T: int) -> None:
        """Settle the mode with the bounds that follow from it, and T; nothing changes if they do not fit."""
        bounds = {name: int(d["max_T"]) for name, d in self.details.items()}
        if neuron.mode not in ("plain", "signed", "masked"):  # whose membranes do not go farther than plain ones
            for name, layer in self._program:
                if isinstance(layer, SpikingLayer):
                    # A grid was chosen for a max_T; what is promised is not more than that.
                    bounds[name] = min(bounds[name], layer.overflow_free_steps(neuron))
        if neuron.mode == "sum":
            bounds = {name: min(bound, MAX_COUNT) for name, bound in bounds.items()}
        if neuron.mode == "signed":
            for name, layer in self._program:
                if not isinstance(layer, SpikingLayer):
                    continue
                digits = 3 if layer.config.weight_bits == 24 else 1  # products of a source
                sent = (layer.sources() * digits, layer.residuals())
                if any(2 * len(found) > MAX_SOURCES for found in sent):
                    raise ValueError(
                        f"neuron {neuron}: layer {name} sums more than {MAX_SOURCES // 2} inputs, and signed neurons "
                        "send two kinds of spikes; use another neuron"
                    )
        stepwise = [n for n, m in self._program if getattr(m.config, "bias_steps", None) is not None]
        if stepwise and not neuron.causal:
            raise ValueError(
                f"neuron {neuron}: layer {stepwise[0]} has a bias for each step, which was found for plain neurons; "
                "use plain or signed, or convert without step_bias"
            )
        worst = min(bounds, key=lambda n: bounds[n], default="")
        if neuron.looks_ahead and bounds and bounds[worst] < neuron.window:
            raise ValueError(
                f"neuron {neuron}: a window of {neuron.window} steps is beyond the overflow bound of {bounds[worst]} "
                f"steps (layer {worst}); use a smaller window, or convert with this neuron and a larger max_T"
            )
        names = ("_bounds", "_max_T", "_neuron", "_beyond", "_remedy")
        before = [self.__dict__.get(name) for name in names]
        most = bounds.get(worst, MAX_SUM)
        self._bounds, self._max_T, self._neuron = bounds, most, neuron
        # What a larger T is told: torch.compile can trace no more than putting strings together.
        if worst in stepwise and most == getattr(dict(self._program)[worst].config, "bias_steps", None):
            self._beyond, self._remedy = f", but step_bias has biases for {most} steps; make a table for T=", ""
        else:
            mode, also = ("", "") if neuron.mode == "plain" else (f" in {neuron} mode", " and this neuron")
            self._beyond = (
                f" is beyond this network's overflow bound of {most} steps{mode} (layer {worst}); "
                "convert again with max_T="
            )
            self._remedy = also
        try:
            self.T = T
        except (TypeError, ValueError):
            for name, value in zip(names, before, strict=True):
                setattr(self, name, value)
            raise

    @property
    def max_T(self) -> int:  # noqa: N802
        return self._max_T

    def bound(self, layer: str) -> int:
        """The largest T for which a spiking layer, by name, cannot overflow in the mode of its neurons."""
        return self._bounds[layer]

    def _checked_steps(self, T: int) -> int:
        if isinstance(T, bool) or not isinstance(T, int):
            raise TypeError(f"T must be an int (time steps), got {T!r}")
        if T < 1:
            raise ValueError(f"T must be at least 1 time step, got {int(T)}")
        if self.max_T < T:
            raise ValueError(f"T={int(T)}{self._beyond}{int(T)}{self._remedy}")
        return T

    @property
    def layers(self) -> Mapping[str, Layer]:
        """All nodes by name, in order of execution."""
        return dict(self._program)

    @property
    def spiking_layers(self) -> Mapping[str, Layer]:
        return {n: m for n, m in self._program if isinstance(m, (EncodingLayer, SpikingLayer))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SNN:
        # .half(), .double() and .to(dtype) must not touch the grid: only the device may change.
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)
        device = self._program[0][1].source.device
        if self.input_shape is not None and (device.type == "cuda" or choice.triton_on_cpu()):
            get_ready(self._program, self.input_shape, Run(self.T, self._neuron), device)
        return self

    def train(self, mode: bool = True) -> SNN:
        """Always eval mode: a converted network has nothing to train."""
        return super().train(False)

    def _check_input(self, x: Any) -> bool:
        """Raises unless x is a batch for this network; whether it has a time axis."""
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
        first = self._program[0][1]
        channels, dims = first.config.channels, first.config.dims
        shape = x.shape
        varying = len(shape) == dims + 1
        if not x.is_floating_point() and not (x.dtype == torch.uint8 and (varying or first.scales_bytes)):
            raise TypeError(
                f"expected a floating-point input {first.batch_shape()}, got {x.dtype}; scale images to floats first, "
                f"or in the model (x / 255) that is converted (event counts, uint8, have a time axis: "
                f"{first.batch_shape('T, ')})"
            )
        if not (varying or len(shape) == dims) or shape[1 + varying] != channels:
            wanted = f"{first.batch_shape()}, or {first.batch_shape('T, ')} over time"
            raise ValueError(f"expected an input of shape {wanted}; got {list(shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("the input requires grad, but spiking inference has no gradient; pass x.detach()")
        if x.device != first.source.device:
            raise ValueError(f"the input is on {x.device}, the network on {first.source.device}; move one with .to()")
        return varying

    def _settled_run(self, x: Any, T: int | None, per_step: bool, skip: int) -> Run:
        """The checks of a call."""
        varying, neuron = self._check_input(x), self._neuron
        if varying and T is None:
            T = int(x.shape[0])
        steps = self._T if T is None else self._checked_steps(T)
        if varying:
            if neuron.mode == "sum":
                raise ValueError("sum mode adds up all steps of one image; for images over time use another neuron")
            if x.shape[0] != steps:
                raise ValueError(f"the input has {x.shape[0]} steps, but T={steps}")
            if neuron.steps(steps) > steps:
                raise ValueError(f"neuron {neuron}: the input must have at least {neuron.window} steps, got {steps}")
        if not isinstance(per_step, bool):
            raise TypeError(f"per_step must be True or False, got {per_step!r}")
        if isinstance(skip, bool) or not isinstance(skip, int):
            raise TypeError(f"skip must be an int (time steps), got {skip!r}")
        if not 0 <= skip < steps:
            raise ValueError(f"skip must leave at least one of T={steps} steps, got {skip}")
        if neuron.mode == "sum" and (per_step or skip):
            raise ValueError("sum mode is an integer ANN, which has no steps: per_step and skip need another neuron")
        return Run(steps, neuron, per_step, skip, varying)

    def run(
        self,
        x: Tensor,
        T: int | None = None,
        per_step: bool = False,
        watch: Callable[[str, Layer, Any], None] | None = None,
        skip: int = 0,
    ) -> Tensor:
        """Execute the graph but its tail; `watch` sees each node's value. Returns [1 or T - skip, N, ...]."""
        self.refuse_several_outputs("run")
        return self._execute(x, self._settled_run(x, T, per_step, skip), watch)

    def _execute(self, x: Tensor | None, run: Run, watch: Callable[[str, Layer, Any], None] | None = None) -> Any:
        """Run all nodes; without x, in a run that goes on, on that of the run before. Several outputs are a list."""
        if x is not None and x.dtype == torch.uint8 and not run.varying:
            x = x.to(torch.float32)
        if not torch.compiler.is_compiling():
            answer = self._executor.answer(self._program, self._header, x, run, watched=watch is not None)
            if answer is not None:
                return answer
            try:
                return self._walk(x, run, watch)
            except ValueError as error:
                made_for = self.input_shape
                if x is None or made_for is None or made_for == (shape := tuple(x.shape[1 + run.varying :])):
                    raise
                raise ValueError(
                    f"{error}. The images are of shape {list(shape)}, and this network was converted for "
                    f"{list(made_for)}: resize them, or convert the model with input_shape={shape}"
                ) from error
        return self._walk(x, run, watch)

    def _walk(self, x: Tensor | None, run: Run, watch: Callable[[str, Layer, Any], None] | None) -> Any:
        """Run all nodes as torch operators."""
        values: Values = {IMAGE: x}
        out: Any = None
        for name, layer in self._program:
            out = None if name == INPUT and x is None else layer(values, run)
            if watch is not None:
                watch(name, layer, out)
            for dead in self._drop[name]:
                del values[dead]
            values[name] = out
        return out if self.outputs is None else [values[name] for name in self._readouts]

    def forget_runs(self) -> None:
        """As before the first call: nothing is said of how the last one ran."""
        self._executor = Executor()
        for layer in self.spiking_layers.values():
            layer.__dict__.pop("engine", None)

    def forward(self, x: Tensor, T: int | None = None, per_step: bool = False, skip: int = 0) -> Any:
        """Run the network.

        Args:
            x: float image batch [N, C, H, W] (or [N, features] for a network that starts with a linear layer), shown
                at every step. With a time axis in front, [T, N, ...], one image for each step: floats, which get one
                exponent for all steps of a sample, or uint8, such as event counts, which are exact. An image may be
                uint8 where the model scales it itself, as x / 255 does.
            T: time steps, default ``self.T``, or those that x has.
            per_step: also return what the network would have answered after fewer steps.
            skip: leave the first steps out of the answer (delayed readout): the mean over steps skip .. T-1.

        Returns:
            float32 [N, classes], the mean over T of the last layer's output; with ``per_step`` float32
            [T - skip, N, classes], the running means after each step, from the same single pass. Where the model
            ends with a softmax or the like (``tail``), that of these means. A model with several outputs gives a tuple,
            list or dict of such tensors, as it does itself.

        Raises:
            ValueError: wrong shape, T out of range, NaN or infinity in x; per_step, skip or a time axis in sum mode.
            TypeError: x is not a floating-point tensor, nor uint8 as above.
        """
        out = self._execute(x, self._settled_run(x, T, per_step, skip))
        return self.answered(out, x.shape, per_step)

    def answered(self, out: Any, image: Sequence[int], per_step: bool) -> Any:
        """What the tails make of answers [S, N, ...] of the readouts, on images of this shape."""
        each = [self.as_given(o) for o in (out if isinstance(out, list) else [out])]  # the native call gives one
        done = [tail.applied(t, o, image) if t else o for t, o in zip(self._tails, each, strict=True)]
        done = done if per_step else [o[0] for o in done]
        return done[0] if self.outputs is None else tail.put_together(self.outputs, done)

    def stream(self) -> Stream:
        """A run that goes on from call to call: :class:`qcfs_fast.Stream`.

        Raises:
            ValueError: the neurons look at later steps (offset, masked) or have no steps (sum).
        """
        return Stream(self, self.answered)

    def predict(
        self,
        x: Tensor,
        confidence: float = 0.9,
        T: int | None = None,
        schedule: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> anytime.Prediction:
        """Classify, stopping each sample as soon as its answer is clear.

        A sample stops after the first step at which the softmax margin of its running mean logits (largest minus
        second largest probability) reaches ``confidence``, and after T steps at the latest; it then leaves the batch.

        Args:
            x: images as for ``snn(x)``.
            confidence: margin at which a sample stops, from 0 (after one step) to 1.
            T: most steps a sample may use, default ``self.T``.
            schedule: rising step counts, the last one T, at which answers are looked at; default 1, 2, 4, ..., T. It
                changes the time taken, never the result (anytime.py says how).
            batch_size: most samples to run at once; default all.

        Returns:
            A named tuple: labels int64 [N], steps int64 [N], logits float32 [N, classes]. Row n of logits equals
            ``snn(x, T, per_step=True)[steps[n] - 1, n]`` of a network without ``tail``, which takes no part here.

        Raises:
            ValueError: confidence, schedule or batch_size out of range; the output is not class scores.
        """
        self.refuse_several_outputs("predict")
        steps = self._checked_steps(self.T if T is None else T)
        level, lengths = anytime.checked_confidence(confidence), anytime.checked_schedule(schedule, steps)
        if self._check_input(x):
            raise ValueError("predict: one image for all steps of a sample is expected; use snn(x, per_step=True)")
        if self._neuron.mode == "sum":
            raise ValueError("predict: sum mode is an integer ANN, which has no steps to stop at; use snn(x)")
        return anytime.predict(self, x, level, lengths, batch_size)

    def report(self) -> str:
        """What conversion settled, one line per spiking layer, and the overflow bound of the whole network."""
        rows = [("layer", "neurons' unit", "weight bits", "exact", "overflow-free T")]
        for name, d in self.details.items():
            bits = f"{d['weight_bits_used']:.1f}"
            exact = "all" if d["lossless"] == d["channels"] else f"{d['lossless']}/{d['channels']}"
            unit = f"theta/{d['threshold_min']}..{d['threshold_max']}"
            rows.append((printable(name), unit, bits, exact, f"<= {self._bounds[name]}"))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        mode = "" if self._neuron.mode == "plain" else f" in {self._neuron} mode"
        bound = f"No integer can overflow for T <= {self.max_T}{mode}, whatever the input."
        shape = "" if self.input_shape is None else f" Settled for images of shape {list(self.input_shape)}."
        few = [
            f"{printable(name)}: {d['few_units']} channels have a threshold of few units, so quiet inputs beside a "
            "loud one are rounded coarsely; weight_bits=24 has finer ones."
            for name, d in self.details.items()
            if d.get("few_units")
        ]
        return "\n".join([*lines, bound + shape, *few])

    def extra_repr(self) -> str:
        text = f"T={self.T}, max_T={self.max_T}, weight_bits={self.weight_bits}, neuron={self._neuron}"
        return text + (f", {self._executor.path}" if self._executor.path else "")

    def save(self, path: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the network to a safetensors file (atomically; no pickle). See :func:`qcfs_fast.load`.

        Args:
            path: the file; one that exists is replaced.
            metadata: what is to be known of the network, by name, as values of JSON: it stands in the file and comes
                back as ``qcfs_fast.load(path).metadata``. Default: ``self.metadata``.

        Raises:
            FileNotFoundError: the folder does not exist.
            TypeError, ValueError: JSON has no such value, or would give another one back.
            FormatError: ``qcfs_fast.load`` would refuse the file.
        """
        saving.save(path, *self.saved(metadata))

    def saved(self, metadata: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Tensor]]:
        """The header and the tensors of a file, of which loading.py makes the network again."""
        about = saving.checked_metadata(self.metadata if metadata is None else metadata)
        tensors = {f"{name}/{key}": t for name, layer in self._program for key, t in layer.tensors()}
        if self.input_shape is not None:
            try:
                self.image_shape(self.input_shape)
            except FormatError as error:
                raise FormatError(f"{error}; set another snn.input_shape, or None, which leaves it open") from error
        header = self._header(tail=self.tail if any(self._tails) else (), metadata=about)
        saving.parsed(header)
        return header, tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> SNN:
        """As of any module, with its hooks; a pickle has none (loading.py)."""
        twin = memo[id(self)] = SNN.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _header(self, **more: Any) -> str:
        """The network but for its tensors, as a file says it, with further fields where they are not empty.

        The native executor needs none of those: it leaves the tail to `forward`.
        """
        graph = [
            {
                "name": name,
                "type": type(layer).__name__,
                "inputs": [INPUT if node == IMAGE else node for node in layer.inputs],
                "config": layer.config.to_dict(),
                "tensors": sorted(layer._buffers),
            }
            for name, layer in self._program
        ]
        return saving.header_text(
            {
                "T": self.T,
                "weight_bits": self.weight_bits,
                "neuron": dataclasses.asdict(self._neuron),
                "input_shape": self.as_map(self.input_shape),
                "details": self.details,
                "graph": graph,
                **({} if self.outputs is None else {"outputs": self.outputs}),
                **{name: value for name, value in more.items() if value},
            }
        )


def check_graph(layers: Sequence[tuple[str, Layer]]) -> None:
    """Every input must name an earlier node, the last node must be the readout."""
    known: set[str] = {IMAGE}
    for name, layer in layers:
        for source in layer.inputs:
            if source not in known:
                raise FormatError(f"node {name!r} reads {source!r}, which is no earlier node")
        if name in known:
            raise FormatError(f"two nodes are called {name!r}")
        known.add(name)
    if not layers or not isinstance(layers[0][1], ImageInput) or layers[0][0] != INPUT:
        raise FormatError("the first node must be the image input")
    ends = [isinstance(layer, Readout) for _, layer in layers]
    answers = {name for name, layer in layers if isinstance(layer, Readout)}
    if not ends[-1] or ends != sorted(ends) or any(answers.intersection(layer.inputs) for _, layer in layers):
        raise FormatError("the last node must be the readout")
