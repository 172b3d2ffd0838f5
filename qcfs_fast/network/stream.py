"""Stream: a run of a network that goes on from call to call.

A neuron that looks at no later step keeps all it knows of the past in its membrane potential (a signed one also in what
it has sent). A stream holds these states between calls, and the spikes counted so far for the readout, so that k steps
and then k more are 2k steps, to the bit:

    stream = snn.stream()
    stream(x, steps=2)       the answer after two steps
    stream(steps=2)          after four, on the same image, whose current is not computed again
    stream(y, steps=4)       after eight, the last four on another image
    stream.reset()           the next call starts anew

Floating-point images get one exponent for all steps of a call. So frames in several calls are those of one call, to the
bit, where they are integers or otherwise need no rounding to 24 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layers import Run
from .state import State


class Stream:
    """A run of a network that goes on from call to call, made by :meth:`SNN.stream`.

    All samples of a batch are at the same step. A call that refuses its arguments or images leaves the stream as it
    was; one that is interrupted, or finds no memory, resets it. States lie on the network's device; moving the network,
    or changing its neuron, ends a stream.

    Attributes:
        steps: the steps computed since the start or the last reset.
    """

    def __init__(self, snn: Any, answered: Callable[..., Any]) -> None:
        if not snn.neuron.causal:
            raise ValueError(
                f"stream: neurons in {snn.neuron} mode have no state to go on from; set snn.neuron to plain or signed"
            )
        self._snn, self._answered = snn, answered
        self._neuron = snn.neuron
        self._state: State | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all: the next call is the first, for a batch of any size. One of the same size reuses the memory."""
        self.steps = 0
        self._memory = None if self._state is None else self._state.abandoned()
        self._state = None
        self._image_shown = False

    def __call__(self, x: Tensor | None = None, steps: int | None = None, per_step: bool = False) -> Any:
        """Run further steps.

        Args:
            x: images [N, ...], shown at each of these steps, or [steps, N, ...], one for each; see ``snn(x)``. None:
                the images of the last call, which must have had no time axis.
            steps: how many; default 1, or those that x has.
            per_step: return the answer after each of these steps.

        Returns:
            float32 [N, classes], the mean over all steps since the start of the last layer's output; with ``per_step``
            [steps, N, classes].

        Raises:
            ValueError: more steps in all than ``snn.max_T``, another batch than before, or as ``snn(x)``.
        """
        if self._snn.neuron != self._neuron:
            raise ValueError(f"stream: it began with {self._neuron} neurons, the network now has {self._snn.neuron}")
        varying = x is not None and self._snn._check_input(x)
        if x is None and not self._image_shown:
            raise ValueError("stream: which images? Pass x; the call before had none that stay the same")
        if varying and steps is None:
            assert x is not None
            steps = int(x.shape[0])
        steps = 1 if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"stream: steps must be a positive int, got {steps!r}")
        if x is not None and varying and x.shape[0] != steps:
            raise ValueError(f"stream: the input has {x.shape[0]} steps, but steps={steps}")
        shape = tuple(x.shape[varying:]) if x is not None else self._state.shape if self._state else ()
        if self._state and shape != self._state.shape:
            raise ValueError(f"stream: it runs on images {list(self._state.shape)}, got {list(shape)}; call reset")
        total = self.steps + steps
        try:
            self._snn._checked_steps(total)
        except ValueError as error:
            raise ValueError(f"stream: {error}, or call reset") from None
        state = State(shape, self._memory) if self._state is None else self._state.before(same_image=x is None)
        run = Run(steps, self._neuron, per_step, varying=varying, state=state, before=self.steps)
        computed = False
        try:
            answer = self._snn._execute(x, run)
            computed = True
            out = self._answered(answer, shape, per_step)
            self._state, self.steps, self._image_shown, self._memory = state, total, not varying, None
        except BaseException as error:
            if computed or not isinstance(error, (TypeError, ValueError)):  # those refuse, before anything is computed
                self.reset()  # the native call may have replaced some of the state
            raise
        return out

    def keep(self, index: Tensor) -> None:
        """Go on with some samples of the batch: bool [N], or int64 positions."""
        if self._state is None:
            raise ValueError("stream: there is no batch yet")
        batch = self._state.shape[0]
        if not isinstance(index, Tensor):
            raise TypeError(f"stream: keep takes bool [N] or int64 positions, got {type(index).__name__}")
        if index.dtype == torch.bool:
            if tuple(index.shape) != (batch,):
                raise ValueError(f"stream: keep takes a bool for each of {batch} samples")
            index = index.nonzero().flatten()
        if index.dim() != 1 or index.dtype != torch.int64:
            raise TypeError(f"stream: keep takes bool [N] or int64 positions, got {index.dtype} {list(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < batch:
            raise IndexError(f"stream: keep takes positions below {batch}")
        self._state = self._state.chosen(index)
