"""Anytime use: stop each sample as soon as its running answer is clear enough.

After t steps a sample's running answer is the mean of the outputs so far. Its margin is the difference of the two
largest softmax probabilities of that mean (float64). It stops after the first step whose margin reaches the
confidence asked for, and after T steps at the latest.

Answers are looked at after the step counts of `schedule`, 1, 2, 4, ... T by default. Plain and signed neurons go on
from their membranes (stream.py), so no step is computed twice: the schedule says how many steps a call of the kernels
computes at once, and a sample is computed for no more steps than the next length of the schedule after its own, less
than twice its own with doubling lengths.

Offset and masked neurons look ahead and have no state: the samples left start again with more steps. A call with
per_step gives the answers after every step up to its own T, and those equal the answers of any longer call, so here too
the schedule changes the work and never the result. A sample that stops after s steps has been computed for less than
4 s steps with doubling lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stream import Stream


class Prediction(NamedTuple):
    """labels int64 [N]; steps used, int64 [N]; logits float32 [N, classes], the running mean after those steps."""

    labels: Tensor
    steps: Tensor
    logits: Tensor


def margins(logits: Tensor) -> Tensor:
    """Largest minus second largest softmax probability: [..., classes] -> float64 [...]."""
    top = torch.softmax(logits.to(torch.float64), -1).topk(2, -1).values
    return top[..., 0] - top[..., 1]


def stopping_steps(margin: Tensor, confidence: float) -> Tensor:
    """Steps each sample uses, int64 [N]: the first whose margin [T, N] reaches the confidence, else T."""
    clear = margin >= confidence
    clear[-1] = True
    return clear.to(torch.uint8).argmax(0) + 1


def checked_confidence(confidence: Any) -> float:
    if isinstance(confidence, bool) or not isinstance(confidence, Real):
        raise TypeError(f"predict: confidence must be a number from 0 to 1 (a softmax margin), got {confidence!r}")
    if not 0 <= float(confidence) <= 1:
        raise ValueError(f"predict: confidence is a difference of probabilities, from 0 to 1; got {confidence}")
    return float(confidence)


def doubling(T: int) -> list[int]:
    """1, 2, 4, ... and T."""
    lengths = [1]
    while lengths[-1] < T:
        lengths.append(min(2 * lengths[-1], T))
    return lengths


def checked_schedule(schedule: Sequence[int] | None, T: int) -> list[int]:
    if schedule is None:
        return doubling(T)
    lengths = list(schedule)
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) for n in lengths):
        raise TypeError(f"predict: schedule must be a sequence of ints (time steps), got {schedule!r}")
    if lengths[0] < 1 or any(b <= a for a, b in pairwise(lengths)):
        raise ValueError(f"predict: schedule must rise from at least 1, got {lengths}")
    if lengths[-1] != T:
        raise ValueError(f"predict: schedule must end with T={T}, got {lengths}")
    return lengths


class _Again:
    """Answers of neurons without a state: a call of this runs all steps so far again. Used as a Stream is."""

    def __init__(self, snn: Any) -> None:
        self._run, self._images, self._steps = snn.run, torch.empty(0), 0

    def __call__(self, x: Tensor | None, steps: int, per_step: bool) -> Tensor:
        self._images = self._images if x is None else x
        self._steps += steps
        return self._run(self._images, self._steps, per_step)[-steps:]

    def keep(self, index: Tensor) -> None:
        self._images = self._images[index]


def predict(
    snn: Any,
    x: Tensor,
    confidence: float,
    schedule: Sequence[int],
    batch_size: int | None,
) -> Prediction:
    """Classify, each sample with as many steps as it needs; see :meth:`SNN.predict`.

    Args:
        snn: the network.
        x: a batch that the network takes.
        confidence, schedule: checked; the schedule's last length is T.
        batch_size: most samples to run at once; None for all.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"predict: batch_size must be a positive int, got {batch_size!r}")
    parts = [_predict(snn, part, confidence, schedule) for part in x.split(batch_size or max(1, x.shape[0]))]
    return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _predict(snn: Any, x: Tensor, confidence: float, schedule: Sequence[int]) -> Prediction:
    go_on: Any = (
        Stream(snn, lambda logits, image, per_step: logits if per_step else logits[0])
        if snn.neuron.causal
        else _Again(snn)
    )  # without a tail
    left = torch.arange(x.shape[0], device=x.device)  # the samples whose answers are not clear yet
    used = torch.empty_like(left)
    logits: Tensor | None = None
    for before, length in pairwise([0, *schedule]):
        running = go_on(x if before == 0 else None, length - before, per_step=True)
        if running.dim() != 3 or running.shape[2] < 2:
            raise ValueError(
                "predict: the network's output is not a list of at least two class scores, but of shape "
                f"{list(running.shape[1:])}; use snn(x, per_step=True)"
            )
        margin = margins(running)
        step = stopping_steps(margin, confidence)
        done = (margin >= confidence).any(0) | (length == schedule[-1])
        if logits is None:
            logits = running.new_empty((x.shape[0], running.shape[2]))
        finished = left[done]
        used[finished] = before + step[done]
        logits[finished] = running[step - 1, torch.arange(left.numel(), device=x.device)][done]
        left = left[~done]
        if left.numel() == 0:
            break
        go_on.keep((~done).nonzero().flatten())
    assert logits is not None
    return Prediction(logits.argmax(1), used, logits)


def trade_off(margin: Tensor, labels: Tensor, targets: Tensor | None, confidences: Sequence[float]) -> list[dict]:
    """What :func:`predict` gives by confidence, read off one full run.

    Args:
        margin, labels: of the running answers, [T, N].
        targets: true labels [N], if known.
        confidences: levels to evaluate.

    Returns:
        Per level: mean_steps, agreement (share of samples with the label of the full run) and accuracy or None.
    """
    points = []
    every = torch.arange(margin.shape[1], device=margin.device)
    for confidence in confidences:
        steps = stopping_steps(margin, confidence)
        answers = labels[steps - 1, every]
        points.append(
            {
                "confidence": float(confidence),
                "mean_steps": float(steps.to(torch.float64).mean()),
                "accuracy": None if targets is None else float((answers == targets).to(torch.float64).mean()),
                "agreement": float((answers == labels[-1]).to(torch.float64).mean()),
            }
        )
    return points
