"""A whole network captured as a CUDA graph: one launch for all its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators.finite import kept_flags, raise_flags


class CudaGraph:
    """A network captured for one input shape; made by :func:`cuda_graph`.

    A call copies the input into a static buffer and replays. The result is a static buffer too: the next call
    overwrites it, so clone what must be kept.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], example: Tensor) -> None:
        if not example.is_cuda:
            raise ValueError(
                f"cuda_graph: the example must be on a GPU, got {example.device}; move it with .to('cuda')"
            )
        self.run = run  # keeps the network, whose weights the graph reads
        self.graph = torch.cuda.CUDAGraph()
        # Normal tensors even under inference_mode: a later call outside of it must write to the input.
        with torch.cuda.device(example.device), torch.inference_mode(False), torch.no_grad():
            self.input = example.detach().clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # packs weights, uploads window tables, fills the allocator
                for _ in range(2):
                    run(self.input)
            torch.cuda.current_stream().wait_stream(side)
            # Torch's own capture stream belongs to the device of the process's first capture.
            with kept_flags() as self._flags, torch.cuda.graph(self.graph, stream=side):
                self.output = run(self.input)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.input.shape:
            raise ValueError(
                f"this graph was captured for inputs of shape {list(self.input.shape)}, got {list(x.shape)}"
            )
        with torch.cuda.device(self.input.device), torch.no_grad():
            self.input.copy_(x)
            self.graph.replay()
        return self.output

    def check(self) -> None:
        """Raise the ValueError of an eager call if the last input held NaN or infinity. Waits for the GPU.

        Replays cannot raise; a sample with such values is computed as if it were zero.
        """
        raise_flags(self._flags)


def cuda_graph(snn: Any, example: Tensor, T: int | None = None, per_step: bool = False) -> CudaGraph:
    """Capture a converted network as a CUDA graph, which launches all its kernels at once.

    Args:
        snn: the network, already on the GPU; it is kept alive by the graph. Capture again after changing it.
        example: an input of the shape, dtype and device that later calls have; its values do not matter, but
            must be finite.
        T: time steps, default ``snn.T``.
        per_step: as in a call of the network.
    """
    return CudaGraph(lambda x: snn(x, T, per_step), example)
