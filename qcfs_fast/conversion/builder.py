"""convert: a QCFS-trained network -> a spiking network of integers.

    trace and lower (lowering.py)  ->  round each layer to its integer grid (units.py)  ->  nodes (network/layers.py)

With data at hand, each layer is rounded for what the nodes made so far send to it (rounding.py).

Lowering says what each neuron integrates, as a sum of signals with float64 weights. Only integers travel between nodes,
so the amplitudes of the signals and the divisors of their pools are folded into those weights here; then the weights
become integers as well. A pool in front of a spiking layer becomes a node of its own, shared by all that read it; pools
in front of the readout work on counts and belong to it. Source: Bu et al., ICLR 2022.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from ..errors import ConversionError
from ..model.qcfs import is_qcfs
from ..model.tracing import refuse_other_trace, symbolic_trace, unwrapped
from ..network.layers import (
    DIGITS,
    IMAGE,
    INPUT,
    ConcatConfig,
    EncodingConfig,
    EncodingLayer,
    ImageConfig,
    ImageInput,
    Layer,
    PoolConfig,
    Readout,
    ReadoutConfig,
    Run,
    SpikeConcat,
    SpikePool,
    SpikingConfig,
    SpikingLayer,
    is_constant,
    word_digits,
)
from ..network.schema import Geometry
from ..network.snn import SNN, check_graph
from ..operators.geometry import POINTWISE
from ..operators.limits import ANALOG_RANGE, CHUNK, IMAGE_BITS, MAX_COUNT, MAX_SOURCES, MAX_SUM, row_blocks
from ..operators.neuron import Neuron
from ..operators.windows import PoolSpec
from . import rounding, units
from .checking import self_check
from .lowering import lower
from .shapes import LAST_SHAPE, usable_shape
from .values import Current, FireNode, Lowered, Part, Product, Signal, by_loudness

FEW_UNITS = 32  # steps of a layer's weights that make up a threshold: with fewer, little is left of quiet inputs
EXACT_BITS = 53 - 15 + 1  # a sum of K products of 16-bit weights and pixels of b bits is exact where b <= this - log2 K


def convert(
    model: nn.Module,
    T: int = 4,
    weight_bits: int = 16,
    max_T: int | None = None,
    input_shape: Sequence[int] | None = None,
    neuron: Neuron | str = "plain",
    window: int = 4,
    iterations: int = 1,
    step_bias: Mapping[str, Tensor] | None = None,
    data: Iterable[Any] | None = None,
    progress: bool = True,
    check: bool = True,
) -> SNN:
    """Convert a QCFS-trained network to a spiking network.

    Args:
        model: made by :func:`qcfs_fast.prepare`, or any traceable model whose activations have a ``thresh``
            tensor and a level count ``L`` (the authors' own). It is not changed. A branch of its forward on the image's
            size is taken as images of 28 to 1024 pixels agree on it, and refused where they do not; the network does
            not ask again.
        T: time steps of a call that names none; any positive integer.
        weight_bits: 16 (default) or 8 bits per weight of the spiking layers; first and last layer keep 16. 24 is for
            figures that shall be those of the float network: up to 24 bits everywhere, in a spiking layer as many as
            32-bit sums hold up to max_T (``snn.report()`` says how many, and a small max_T leaves more). Each weight
            is then three products of 8 bits.
        max_T: the largest T this network will be asked for; default max(T, 32). The integer grid is chosen so
            that no sum can overflow 32 bits up to there; a larger value costs resolution in wide layers.
        input_shape: [C, H, W] of the images, or [C, L]; needed only where an adaptive, ceil-mode or partially padded
            average pool stands before a spiking layer. Default: what the prepared model last saw.
        neuron: the mode of all neurons: "plain", the paper's; "offset", which wins back the accuracy that plain ones
            lose at few time steps; "masked", "signed"; or "sum", the ANN with L = T as an integer network
            (docs/neurons.md). It can be changed later: ``snn.neuron``.
        window, iterations: of offset and masked neurons, where `neuron` is no :class:`qcfs_fast.Neuron` itself.
        step_bias: a bias for each step and activation, from :func:`qcfs_fast.step_biases`; for plain and signed
            neurons. T is then at most the steps of the table.
        data: image batches [N, C, H, W] (or [N, features]), or (images, ...) tuples as a DataLoader gives; a
            thousand images are enough, and labels are not used. With data, weights are rounded so that their errors
            compensate each other on these images in T steps (see below). Default: each is rounded to the nearest.
        progress: with data, show a progress bar.
        check: compare the model with the graph that torch.fx traced of it, on a random image, and end with a
            self-check: two steps of one random image through the result and through the model in float64,
            layer by layer on the same spikes; a channel that integrates something else is a fault of this package and
            raises. It added a tenth (VGG-11) to one time and a half (ResNet-18 on 224 pixels) to the rest. What passes
            is what the rounding of the weights explains, or a fiftieth of a layer's usual current. There is no check
            where no size of images is known: none was given, the model was not run, and it takes none of the usual
            ones.

    Returns:
        An :class:`qcfs_fast.SNN` in eval mode, on the CPU.

    Raises:
        ConversionError: a layer has no spiking counterpart, or does not fit 32 bits; the message names it.
        TypeError, ValueError: an argument is none that this function takes; the message names it.

    Rounding by data takes one layer after the other. What the network converted so far sends to the layer gives the
    mean and the covariance of its inputs. The weights of a channel are rounded one by one, each so that it makes up
    for the errors of those before it, and the bias takes up the mean error that is left. The method is that of
    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.
    It trains nothing, and the same data gives the same network. Measured on two trained networks at 8 bits, about half
    of the spikes that rounding changes in a layer remained at T = 4, and 75 to 90 % at T = 1. Labels hardly changed:
    through many layers one wrong spike does as much as two. 16 bits keep more labels than 8 bits with data. Lossless
    channels stay as they are. So do the first layer, which reads the analog image, and the readout; both have at least
    16 bits.

    Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural
    Networks", ICLR 2022: initial membrane potential theta/2, soft reset, threshold = trained lambda.
    """
    for name, value in (("T", T), ("max_T", T if max_T is None else max_T)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"convert: {name} must be an int (time steps), got {value!r}")
        if value < 1:
            raise ValueError(f"convert: {name} must be at least 1 time step, got {value}")
    if weight_bits not in (8, 16, 24):
        raise ValueError(f"convert: weight_bits must be 8, 16 or 24, got {weight_bits!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(model, SNN):
        raise TypeError("convert: this network is converted already; convert the trained model instead")
    limit = max(T, 32) if max_T is None else max_T
    if limit < T:
        raise ValueError(f"convert: max_T={limit} is below T={T}")
    settled = neuron if isinstance(neuron, Neuron) else Neuron(neuron, window, iterations)
    if settled.mode == "sum" and T > MAX_COUNT:
        raise ValueError(f"convert: in sum mode T is at most {MAX_COUNT}, the levels that a count has; got {T}")
    if settled.looks_ahead:
        limit = max(limit, settled.window)
    _warn_if_untrained(model)
    traced = symbolic_trace(model)
    known = input_shape or model.__dict__.get(LAST_SHAPE)
    lowered, shape = lower(traced, known)
    if not lowered.layers:
        raise ConversionError("the model has no QCFS activation; call qcfs_fast.prepare(model) first")
    if step_bias is not None:
        limit = _add_step_bias(lowered, step_bias, settled, T, max_T)
    totals = min(T if max_T is None else max_T, MAX_COUNT) if settled.mode == "sum" else 1
    image = lowered.image
    batches = None if data is None else rounding.checked_batches(data, image.channels, image.dims)
    prefix = None if batches is None else rounding.Prefix(batches, Run(T, settled))
    builder = _Builder(lowered, weight_bits, T, limit, settled, totals, prefix)
    snn = builder.build(shape, progress and data is not None)
    if check:
        usable = usable_shape(traced, image, shape or known)
        if not isinstance(model, fx.GraphModule):
            refuse_other_trace(model, traced, usable)
        if usable is not None:
            self_check(traced, snn, usable, step_bias, builder.errors)
    return snn


def _add_step_bias(lowered: Lowered, table: Mapping[str, Tensor], neuron: Neuron, T: int, max_T: int | None) -> int:
    """Take a table of biases off those of the layers, which become [steps, O]; returns the largest T.

    With max_T given no more steps are taken than that: the integer grid must serve them all.
    """
    if not neuron.causal:
        raise ValueError(f"convert: step_bias goes with plain and signed neurons, not with {neuron.mode}")
    layers = [node for node in lowered.layers if not is_constant(node.name)]
    names = [node.name for node in layers]
    if not isinstance(table, Mapping) or set(table) != set(names):
        raise ValueError(
            f"convert: step_bias must have a table for each activation ({', '.join(names)}); "
            "make it with qcfs_fast.step_biases(model, batches)"
        )
    steps = {int(t.shape[0]) if isinstance(t, Tensor) and t.dim() == 2 else 0 for t in table.values()}
    if len(steps) != 1 or min(steps) < (T if max_T is None else max_T):
        raise ValueError(
            "convert: step_bias must hold a tensor [steps, C] for each activation, all of the same number of steps and "
            f"of at least {T if max_T is None else max_T}; "
            "make it with qcfs_fast.step_biases(model, batches, T=...)"
        )
    taken = steps.pop() if max_T is None else max_T
    for node in layers:
        bias = table[node.name].detach().to(torch.float64).cpu()
        if bias.shape[1] not in (1, node.theta.numel()) or not bool(torch.isfinite(bias).all()):
            raise ValueError(f"convert: step_bias of {node.name} must be finite, [steps, {node.theta.numel()}]")
        node.step_bias = -bias[:taken].expand(-1, node.theta.numel())
    return taken


def _warn_if_untrained(model: nn.Module) -> None:
    sites = [(n, m) for n, m in model.named_modules() if is_qcfs(m)]
    fresh = [n for n, m in sites if bool((m.thresh.detach() == getattr(m, "initial_threshold", 8.0)).all())]
    if sites and len(fresh) == len(sites):
        warnings.warn(
            f"convert: no threshold of this model has been trained (all {len(sites)} are at their initial value). "
            "Train it, or set thresholds with qcfs_fast.calibrate, or accuracy will be poor",
            stacklevel=3,
        )


def _fold(product: Product, amplitude: Tensor, channels: slice = slice(None)) -> np.ndarray:
    """Effective weight of some output channels, input amplitude folded in: [KH, KW, C/groups, O] (linear: [1, 1,
    area*C, O]).
    """
    groups, O = product.geometry[8], product.stored.shape[0]
    group = torch.arange(O)[channels] // (O // groups)
    w = product.rows(channels) * amplitude.reshape(groups, -1)[group, :, None, None]
    if product.vector:
        return w.permute(2, 3, 1, 0).reshape(1, 1, -1, w.shape[0]).numpy()
    return w.permute(2, 3, 1, 0).numpy()


def _flat(weight: np.ndarray) -> np.ndarray:
    """[KH, KW, C/groups, O] -> [K, O]."""
    return weight.reshape(-1, weight.shape[3])


def _folded_shape(product: Product) -> tuple[int, ...]:
    """The shape of `_fold`."""
    O, C, height, width = product.stored.shape
    return (1, 1, height * width * C, O) if product.vector else (height, width, C, O)


def _geometry(product: Product) -> Geometry:
    return POINTWISE if product.vector else product.geometry


class _Builder:
    """Makes the nodes of a lowered network in order. `made` are pools and concatenations by what they compute."""

    def __init__(
        self,
        lowered: Lowered,
        weight_bits: int,
        T: int,
        max_T: int,
        neuron: Neuron,
        totals: int,
        prefix: rounding.Prefix | None,
    ) -> None:
        self.prefix = prefix
        self.lowered = lowered
        self.weight_bits = weight_bits
        self.long = 24 if weight_bits == 24 else None  # as nodes say it
        self.T = T
        self.max_T = max_T
        self.neuron = neuron
        self.totals = totals  # spikes of a neuron that one count holds
        self.layers: list[tuple[str, Layer]] = []
        self.made: dict[Any, str] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, np.ndarray] = {}  # of layers rounded by data, as the self-check takes them

    def build(self, shape: tuple[int, ...] | None, progress: bool) -> SNN:
        """The network: the image, then a node per activation (pools and concatenations before it), then the readout."""
        image = self.lowered.image
        self._add(
            INPUT,
            ImageInput(
                [IMAGE],
                ImageConfig(image.channels, image.vector, self._image_bits(), image.line or None, image.moves or None),
                {
                    "source": torch.tensor(image.source, dtype=torch.int64),
                    "scale": torch.tensor(image.scale, dtype=torch.float32),
                    "shift": torch.tensor(image.shift, dtype=torch.float32),
                },
            ),
        )
        activations = self.lowered.layers
        for i, activation in enumerate(tqdm(activations, desc="rounding", unit="layer", disable=not progress)):
            if self.prefix is not None:
                self.prefix.keep({name for a in activations[i:] for c in a.currents for name in c.nodes()})
            nodes = activation.nodes()
            for node in nodes:
                self._neurons(node)
            if len(nodes) > 1:
                self._add(activation.name, SpikeConcat([node.name for node in nodes], ConcatConfig(), {}))
        answers = self.lowered.outputs
        for answer in answers:
            self._readout(answer.current)
        check_graph(self.layers)
        form = self.lowered.form
        tails: Any = answers[0].steps if form is None else [a.steps for a in answers]
        return SNN(self.layers, self.T, self.weight_bits, self.details, shape, self.neuron, tails, form)

    def _neurons(self, node: FireNode) -> None:
        """A spiking layer."""
        products = node.current.products
        # The image is not spikes: its current is computed once, in double, and the same at every step.
        analog = [p for p in products if p.part.is_image] + [
            s for s in node.current.identities if any(q.is_image for q in s.parts)
        ]
        if len(analog) > 1:
            raise ConversionError(f"{node.name}: the image enters twice; merge the two layers that read it")
        if analog and len(products) + len(node.current.identities) == 1:
            self._encoder(node, analog[0])
        else:
            self._spiking(node, analog[0] if analog else None)

    def _image_bits(self) -> int:
        """Bits of a pixel: IMAGE_BITS, or as many as leave the largest sum of the image's layers exact in double."""
        products = [p for a in self.lowered.layers for c in a.currents for p in c.products]
        fan_in = [p.stored[0].numel() for p in products if p.part.is_image]
        return min(IMAGE_BITS, EXACT_BITS - math.ceil(math.log2(max([*fan_in, 1]))))

    def _add(self, name: str, layer: Layer) -> None:
        self.layers.append((name, layer))
        if self.prefix is not None:
            self.prefix.add(name, layer)

    def _unused(self, stem: str) -> str:
        taken = {n for n, _ in self.layers} | {n.name for n in self.lowered.layers}
        tops = {n.split(".")[0] for n in taken}
        i = 1
        while f"{stem}_{i}" in taken | tops:
            i += 1
        return f"{stem}_{i}"

    # ------------------------------------------------------------------------------------- sources

    def _sources(self, part: Part) -> list[tuple[str, int]]:
        """The nodes whose integers add up to a settled part's, with their peaks; pools are made where needed."""
        if not part.pools:
            return [(part.node, 1)]
        *before, last = part.pools
        found = []
        for inner, peak in self._sources(Part(part.node, part.amplitude, tuple(before))):
            if last.kind == "max":
                found.append((self._pool(inner, last), peak))
                continue
            try:
                sections = last.sections(MAX_COUNT // (peak * self.totals))
            except ValueError:
                raise ConversionError(
                    f"pooling of {part.node}: windows of different sizes need a common multiple of {last.multiple}, "
                    f"and count planes hold at most {MAX_COUNT // self.totals}"
                    + (f" at T={self.totals} in sum mode" if self.totals > 1 else "")
                    + ". Remedy: use images whose feature maps the pool divides evenly"
                    + (", or a smaller T" if self.totals > 1 else "")
                ) from None
            found += [(self._pool(inner, s), s.largest_value() * peak) for s in sections]
        return found

    def _pool(self, source: str, spec: PoolSpec) -> str:
        key = (source, spec)
        if key not in self.made:
            self.made[key] = self._unused(f"{spec.kind}pool")
            self._add(self.made[key], SpikePool([source], PoolConfig(spec), {}))
        return self.made[key]

    def _residuals(self, signal: Signal, where: str) -> list[tuple[str, Tensor, int]]:
        """A residual signal as nodes that add up to it: name, amplitude [O] and peak of each."""
        parts = [p.settled() for p in signal.parts]
        amplitude = torch.cat([p.amplitude for p in parts])
        sources = [self._sources(p) for p in parts]
        if len(parts) == 1:
            return [(node, amplitude, peak) for node, peak in sources[0]]
        planes = {any(q.kind == "avg" for q in p.pools) for p in parts}
        if len(planes) > 1 or any(len(s) > 1 for s in sources):
            raise ConversionError(
                f"{where}: concatenates spikes and averages, and adds the result as a residual; put an "
                "activation after the concatenation"
            )
        names = [s[0][0] for s in sources]
        key = ("concat", *names)
        if key not in self.made:
            self.made[key] = self._unused("concat")
            self._add(self.made[key], SpikeConcat(names, ConcatConfig(), {}))
        return [(self.made[key], amplitude, max(s[0][1] for s in sources))]

    # -------------------------------------------------------------------------------------- layers

    def _analog_operands(self, term: Product | Signal) -> tuple[np.ndarray, Geometry, str]:
        """Weight [KH, KW, C/groups, O], geometry and name of the layer that reads the image."""
        if isinstance(term, Product):
            return _fold(term, term.part.amplitude), _geometry(term), term.layer
        amplitude = torch.cat([p.amplitude for p in term.parts])
        C = amplitude.numel()
        return amplitude.reshape(1, 1, 1, C).numpy(), (*POINTWISE[:8], C), "identity"

    def _analog_tensors(self, weight: np.ndarray, unit: np.ndarray, name: str) -> tuple[dict[str, Tensor], int]:
        flat = weight.reshape(-1, weight.shape[3])
        if not np.isfinite(flat).all():
            raise ConversionError(f"{name}: weights are not finite (NaN or infinity); check the trained model")
        tensors, scale, exact = self._words(weight, "weight")
        return {**tensors, "gain": torch.from_numpy(scale / unit)}, int(exact.sum())

    def _words(self, weight: np.ndarray, name: str) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
        """A weight [KH, KW, C/groups, O] in int16, of 24 bits with its last digit; its unit; whether that is exact."""
        scale, exact = units.choose_weight_scale(weight.reshape(-1, weight.shape[3]), self.weight_bits)
        whole = np.rint(weight / scale).astype(np.int64)
        parts = {name: whole}
        if self.weight_bits == 24:
            parts[name], parts[name + DIGITS[2]] = units.split(whole)
        return {key: torch.from_numpy(part.astype(np.int16)) for key, part in parts.items()}, scale, exact

    def _encoder(self, node: FireNode, term: Product | Signal) -> None:
        weight, geometry, layer = self._analog_operands(term)
        theta, bias = node.theta.numpy(), node.current.bias.numpy()
        if not np.isfinite(bias).all():
            raise ConversionError(f"{node.name}: bias is not finite (NaN or infinity); check the trained model")
        unit, n = units.choose_analog_unit(theta)
        O = theta.size
        tensors, exact = self._analog_tensors(weight, unit, node.name)
        tensors["offset"] = torch.from_numpy(bias / unit)
        tensors["low"] = torch.zeros(O, dtype=torch.int32)
        tensors["threshold"] = torch.from_numpy(n.astype(np.int32))
        tensors["high"] = tensors["threshold"].clone()
        config = EncodingConfig(geometry, node.current.vector, (layer,), weight_bits=self.long)
        max_T = MAX_SUM
        if node.step_bias is not None:
            max_T = node.step_bias.shape[0]
            config = replace(config, bias_steps=max_T)
            tensors["bias"] = torch.from_numpy(np.rint(node.step_bias.numpy() / unit).astype(np.int64))
            if bool((tensors["bias"].abs() > tensors["threshold"] // 2).any()):
                raise ConversionError(f"{node.name}: step_bias exceeds half a threshold; use a smaller alpha")
            tensors["bias"] = tensors["bias"].to(torch.int32)
        self._add(node.name, EncodingLayer([INPUT], config, tensors))
        self.details[node.name] = self._detail(node, n, exact, float(self.long or 16), max_T)

    @staticmethod
    def _detail(node: FireNode, n: np.ndarray, lossless: int, bits: float, max_T: int) -> dict[str, Any]:
        return {
            "channels": n.size,
            "lossless": lossless,
            "threshold_min": int(n.min()),
            "threshold_max": int(n.max()),
            "weight_bits_used": bits,
            "max_T": max_T,
            "levels": node.levels,
            "theta": node.theta.tolist(),
        }

    def _spiking(self, node: FireNode, analog: Product | Signal | None) -> None:
        current = node.current
        spiking = [p for p in current.products if p is not analog]
        parts = [p.part.settled() for p in spiking]
        weights = [functools.partial(_fold, p, part.amplitude) for p, part in zip(spiking, parts, strict=True)]
        sources = [self._sources(p) for p in parts]
        residuals = [r for s in current.identities if s is not analog for r in self._residuals(s, node.name)]
        if max(sum(map(len, sources)), len(residuals)) > MAX_SOURCES:
            raise ConversionError(
                f"{node.name}: it sums {sum(map(len, sources))} inputs and {len(residuals)} residuals, at most "
                f"{MAX_SOURCES} of each fit. A pool whose sums exceed {MAX_COUNT} is cut into sections, each an input, "
                "and so is each tap of a layer that has a border and no activation before the next. Remedy: smaller "
                "pools, or an activation between such layers" + (", or a smaller T" if self.totals > 1 else "")
            )
        peaks = [sum(peak for _, peak in s) for s in sources]  # all sections of a pool meet the same weight
        shapes = [_folded_shape(p) for p in spiking]
        fan_in = max(1, sum(math.prod(shape[:3]) for shape in shapes))
        layer = self._quantized(node, weights, max(1, CHUNK // fan_in), peaks, residuals, analog is not None)
        if self.prefix is not None and spiking and not layer.lossless.all():
            read = [([n for n, _ in s], _geometry(p)) for s, p in zip(sources, spiking, strict=True)]
            layer = rounding.compensated(
                layer,
                [_flat(folded(slice(None))) for folded in weights],
                node.bias().numpy(),
                [*peaks, *(peak for _, _, peak in residuals)],
                self.prefix.moments(read, current.vector),
                self.weight_bits,
                self.max_T,
                analog is not None,
                self.neuron,
            )
            assert layer.error is not None
            self.errors[node.name] = layer.error

        tensors: dict[str, Tensor] = {}
        for i, w in enumerate(layer.weights):
            for digit, whole in self._digits(w).items():
                shaped = torch.from_numpy(whole.reshape(shapes[i]))
                tensors[f"weight_{i}{digit}"] = shaped[0, 0].contiguous() if current.vector else shaped
        for i, a in enumerate(layer.amplitudes):
            tensors[f"amplitude_{i}"] = torch.from_numpy(a.astype(np.int32))
        tensors["bias"] = torch.from_numpy(layer.bias.astype(np.int32))
        max_T = layer.max_steps
        tensors["threshold"] = torch.from_numpy(layer.threshold.astype(np.int32))

        inputs = [name for s in sources for name, _ in s] + [name for name, _, _ in residuals]
        config = SpikingConfig(
            weight_index=tuple(i for i, s in enumerate(sources) for _ in s),
            geometry=tuple(_geometry(p) for p, s in zip(spiking, sources, strict=True) for _ in s),
            vector=current.vector,
            layers=tuple(p.layer for p in spiking),
            peaks=(*(peak for s in sources for _, peak in s), *(peak for _, _, peak in residuals)),
            weight_bits=self.long,
        )
        if self.long and len(DIGITS) * len(config.weight_index) > MAX_SOURCES:
            raise ConversionError(
                f"{node.name}: sums {len(config.weight_index)} products; with 24-bit weights it can be "
                f"{MAX_SOURCES // len(DIGITS)}. Remedy: use weight_bits=16"
            )
        if node.step_bias is not None:
            max_T = min(max_T, node.step_bias.shape[0])
            config = replace(config, bias_steps=node.step_bias.shape[0])
            tensors["bias"] = tensors["bias"].reshape(node.step_bias.shape)
        if analog is not None:  # it shares the unit of the spikes' weights, so that both add up
            weight, geometry, _ = self._analog_operands(analog)
            config = replace(config, analog_geometry=geometry)
            made, _ = self._analog_tensors(weight, layer.unit, node.name)
            tensors["gain"] = made.pop("gain")
            tensors.update({f"analog_{key}": t for key, t in made.items()})
            tensors["offset"] = torch.zeros(current.channels, dtype=torch.float64)
            high = (ANALOG_RANGE * layer.threshold).astype(np.int32)
            tensors["high"], tensors["low"] = torch.from_numpy(high), torch.from_numpy(-high)
            inputs.append(INPUT)
        self._add(node.name, SpikingLayer(inputs, config, tensors))

        used = layer.weight_levels[layer.weight_levels > 0]
        bits = float(np.log2(used.min()) + 1) if used.size else 0.0
        self.details[node.name] = self._detail(
            node, layer.threshold, int(layer.lossless.sum()), bits, min(max_T, MAX_SUM)
        )
        if few := self._few_units(node, layer):
            self.details[node.name]["few_units"] = few

    def _digits(self, w: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a spiking layer's weight, by what is added to its name."""
        if self.weight_bits == 16:
            return {"": w.astype(np.int16, copy=False)}
        names = DIGITS if self.weight_bits == 24 else DIGITS[:1]
        digits = {name: np.empty(w.shape, np.int8) for name in names}
        for rows in row_blocks(w):
            upper, low = units.split(w[rows])
            found = (upper,) if self.weight_bits == 8 else (*units.split(upper), low)
            for digit, x in zip(digits.values(), found, strict=True):
                digit[rows] = x
        return digits

    def _quantized(
        self,
        node: FireNode,
        weights: Sequence[Callable[[slice], np.ndarray]],
        block: int,
        peaks: list[int],
        residuals: list[tuple[str, Tensor, int]],
        analog: bool,
    ) -> units.QuantizedLayer:
        """units.choose over blocks of output channels, to bound the memory it takes."""
        theta, bias = node.theta.numpy(), node.bias().numpy()

        def quantized(s: slice) -> units.QuantizedLayer:
            own = [(_flat(folded(s)), peak) for folded, peak in zip(weights, peaks, strict=True)]
            added = [(a.numpy()[s], peak) for _, a, peak in residuals]
            settings = (self.weight_bits, self.max_T, analog, self.neuron)
            return units.choose(node.name, theta[s], own, added, bias[..., s], *settings)

        blocks = (slice(c, c + block) for c in range(0, theta.size, block))
        layer = units.join(map(quantized, blocks), theta.size)
        if layer.scarce_bits is not None:
            warnings.warn(
                f"{node.name}: 32 bits leave only {layer.scarce_bits:.1f} bits for the weights of one channel "
                f"at max_T={self.max_T} (the bound is n/2 + T*sum|w| < 2^31); convert with a smaller max_T for more",
                stacklevel=6,
            )
        return layer

    def _few_units(self, node: FireNode, layer: units.QuantizedLayer) -> int:
        """The channels whose thresholds are under FEW_UNITS steps of their weights; warns of them."""
        steps = np.where(layer.lossless, FEW_UNITS, layer.threshold // units.weight_grid(self.weight_bits)[0])
        few = steps < FEW_UNITS
        if not few.any():
            return 0
        c = int(steps.argmin())
        largest = f"{layer.weight_levels[c] / layer.threshold[c]:.3g}"
        warnings.warn(
            f"{node.name}: the threshold of {few.sum()} of {few.size} channels is under {FEW_UNITS} steps of their "
            f"weights (channel {c}: {steps[c]}), because one weight is {largest} thresholds: it rounds quiet inputs "
            "beside that loud one away. Remedy: weight_bits=24, or scale the loud input or branch down in training",
            stacklevel=6,
        )
        return int(few.sum())

    def _readout(self, current: Current) -> None:
        if any(p.part.is_image for p in current.products) or any(
            q.is_image for s in current.identities for q in s.parts
        ):
            raise ConversionError(
                "the output depends on the image without an activation in between. Remedy: leave that path out, and "
                "add it to the network's answer (x - snn(x), where the model says x - self.layers(x))"
            )
        inputs: list[str] = []
        layers: list[str] = []
        pools: list[tuple[PoolSpec, ...]] = []
        vectors: list[bool] = []
        geometry: list[Geometry] = []
        tensors: dict[str, Tensor] = {}

        def add(part: Part, vector: bool, geo: Geometry, gain: Tensor, layer: str) -> None:
            tensors[f"gain_{len(inputs)}"] = gain
            inputs.append(part.node)
            pools.append(part.pools)
            vectors.append(vector)
            geometry.append(geo)
            layers.append(layer)

        for p in (q for product in current.products for q in by_loudness(product)):
            weight = _fold(p, p.part.amplitude)
            flat = weight.reshape(-1, weight.shape[3])
            if not np.isfinite(flat).all():
                raise ConversionError(f"{p.layer}: weights are not finite (NaN or infinity); check the trained model")
            words, scale, _ = self._words(weight, f"weight_{len(inputs)}")
            tensors.update(words)
            add(p.part, p.vector, _geometry(p), torch.from_numpy(scale.copy()), p.layer)
        for s in current.identities:
            if len(s.parts) > 1 and (len(current.products) + len(current.identities) > 1):
                raise ConversionError("the output adds a concatenation; put an activation or a layer after it")
            if len(s.parts) > 1:
                raise ConversionError("the output is a concatenation of spikes; end the network with a layer")
            part = s.parts[0]
            nothing = torch.empty(0, dtype=torch.int16)
            tensors.update({f"weight_{len(inputs)}{digit}": nothing.clone() for digit in word_digits(self.long)})
            add(part, current.vector, POINTWISE, part.amplitude, "")
        if not bool(torch.isfinite(current.bias).all()):
            raise ConversionError("readout: bias is not finite (NaN or infinity); check the trained model")
        tensors["offset"] = current.bias.clone()
        config = ReadoutConfig(
            pools=tuple(pools),
            vectors=tuple(vectors),
            geometry=tuple(geometry),
            layers=tuple(layers),
            vector=current.vector,
            flattened=current.flattened,
            weight_bits=self.long,
        )
        name = layers[0] if layers[0] and layers[0] not in {n for n, _ in self.layers} else self._unused("readout")
        self._add(name, Readout(inputs, config, tensors))
