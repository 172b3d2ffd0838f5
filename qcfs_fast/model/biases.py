"""step_biases: what each layer should subtract from its currents at each step, from data (FTBC).

A plain neuron fires at other steps than the average of QCFS asks for, above all early ones. FTBC (forward temporal bias
correction; Wu et al., ECCV 2024) measures by how much a layer's mean output is wrong at each step and takes a share
alpha of it from the channel's current. With a the activation of the QCFS network, x[t] the layer's current of step t
under the biases found for the layers before it, and H the step function that is 1 at 0:

    v = theta/2
    at each step t:   m = v + x[t]
                      d = theta * H(m - theta) - a        how far the output is from what it should be
                      b[t] = alpha * mean of d over images and positions, by channel
                      m = m - d
                      v = m - theta * H(m - theta)

The neuron then runs with v += x[t] - b[t]. Only forward passes are needed. b[t] depends on steps up to t alone, so one
table for the largest T serves every smaller T.

The published rule stops there and does not look at what b[t] does. An output is a step function of the current, so its
mean need not follow a shift of the current in proportion. On images with a background of one value a third of the first
layer's neurons have one and the same current: a small shift carries all of them across the threshold, or none. The rule
then makes the error larger, and later layers start from it. So the mean of theta * H(m - b - theta) - a is computed for
b[t], for its half and so on, and for 0, and the one that leaves the least is taken.

A layer's biases need the currents of all images, and its output needs the biases. So the graph is executed node by
node, each node for all images before the next: once as the QCFS network, and once for each step. No layer is run again
for the sake of a later one, at the price of memory: what later nodes still need is kept for all images, T + 1 times.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from ..errors import ConversionError
from .calibration import images_of
from .graph import call_sites
from .neurons import plain
from .qcfs import over_channels, qcfs
from .tracing import evaluating, symbolic_trace

TRIED = 4  # corrections: that of the rule, its half, its quarter, ...


def step_biases(
    model: nn.Module, batches: Iterable[Any], T: int = 8, alpha: float = 0.5, progress: bool = False
) -> dict[str, Tensor]:
    """Biases by layer and time step that bring each layer's mean output nearer to that of the QCFS network.

    Args:
        model: the model that convert() takes, trained. It is not changed.
        batches: an iterable of image batches, or of (images, ...) tuples as a DataLoader gives; some hundred images
            are enough. Labels are not used. All are held in memory: about T + 1 times what the QCFS network needs to
            run them as one batch.
        T: time steps to find biases for; the first t rows serve t steps.
        alpha: the share of the error to correct, in (0, 1]. Less is corrected where that leaves a smaller error.
        progress: show a progress bar.

    Returns:
        By site name a table [T, channels] in float64, in the units of the model's activations (as theta): what convert
        and simulate take as step_bias.

    Raises:
        ValueError: T or alpha is out of range, or batches is empty or not finite.
        TypeError: a batch is no tensor.
        ConversionError: the model cannot be traced, or has no QCFS activation.
    """
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"step_biases: T must be a positive int (time steps), got {T!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"step_biases: alpha must be in (0, 1], got {alpha!r}")
    with evaluating(model):
        gm = copy.deepcopy(symbolic_trace(model))
    sites = {node: (name, module) for name, node, module in call_sites(gm)}
    if not sites:
        raise ConversionError("step_biases: the model has no QCFS activation; call qcfs_fast.prepare(model) first")
    first = next(gm.parameters())
    images = [x.to(first.device, first.dtype) for x in images_of(batches, "step_biases")]

    # For each batch an execution as the QCFS network, then one for each step. Values die after their last use.
    runs = [[fx.Interpreter(gm) for _ in range(T + 1)] for _ in images]
    biases: dict[str, Tensor] = {}
    bar = tqdm(total=len(sites), desc="step biases", unit="layer", disable=not progress)
    with torch.no_grad(), bar:
        for node in gm.graph.nodes:
            if len(biases) == len(sites):
                break  # nothing after the last activation has a bias
            if node in sites:
                name, module = sites[node]
                biases[name] = _layer(node, module, runs, alpha)
                bar.update()
            else:
                for x, batch in zip(images, runs, strict=True):
                    for run in batch:
                        run.env[node] = x.clone() if node.op == "placeholder" else run.run_node(node)
            for run in (run for batch in runs for run in batch):
                for dead in run.user_to_last_uses.get(node, []):
                    del run.env[dead]
    return biases


def _layer(node: fx.Node, module: Any, runs: list[list[fx.Interpreter]], alpha: float) -> Tensor:
    """The biases [T, C] of one activation; afterwards it has fired with them in every run."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    z = [batch[0].env[source] for batch in runs]
    theta = over_channels(module.thresh, z[0])
    answers = [qcfs(x, theta, int(module.L)) for x in z]
    elements = sum(x.numel() // x.shape[1] for x in z)

    def errors(membranes: list[Tensor], bias: Tensor | None = None) -> list[Tensor]:
        b = 0 if bias is None else bias.to(theta).reshape(-1, *[1] * (z[0].dim() - 2))
        return [theta * (m - b >= theta) - a for m, a in zip(membranes, answers, strict=True)]

    def mean(d: list[Tensor]) -> Tensor:
        return sum((x.to(torch.float64).transpose(0, 1).flatten(1).sum(1) for x in d), torch.zeros(())) / elements

    biases: list[Tensor] = []
    membranes = [theta / 2] * len(runs)
    for step in range(1, len(runs[0])):
        membranes = [v + batch[step].env[source] for v, batch in zip(membranes, runs, strict=True)]
        d = errors(membranes)
        wrong = mean(d)
        best, least = torch.zeros_like(wrong), wrong.abs()
        for bias in (alpha * wrong / 2**halvings for halvings in range(TRIED)):
            left = mean(errors(membranes, bias)).abs()
            best, least = torch.where(left < least, bias, best), torch.minimum(left, least)
        biases.append(best)
        membranes = [m - e for m, e in zip(membranes, d, strict=True)]
        membranes = [m - theta * (m >= theta) for m in membranes]
    table = torch.stack(biases)
    for batch, a in zip(runs, answers, strict=True):
        batch[0].env[node] = a
        b = table.to(theta).reshape(len(table), 1, -1, *[1] * (a.dim() - 2))
        x = torch.stack([run.env[source] for run in batch[1:]])
        for run, spikes in zip(batch[1:], plain(x - b, theta).spikes, strict=True):
            run.env[node] = theta * spikes
    return table.cpu()
