"""The tail of a network: what the model does to its readout, in floats, such as a softmax.

A tail has no spikes. It follows the mean over the time steps, since that mean is what stands for the model's logits:
the softmax of a mean is not the mean of softmaxes. With per_step it is applied to every running mean. It is computed in
float64 and rounded, so that answers do not depend on the batch: torch's vectors and their ends differ by an ulp.

A step is a name and, but for functions of one number, a dimension of the answer [N, ...], from 1 on; or what a resize
needs, an object (RESIZE). In a saved file a tail is a list of such lists, [["squeeze", 1], ["sigmoid"]].

A network with several outputs has a readout and a tail for each. `Form` says how they are put together: the number of a
readout, or ["tuple" or "list", forms] or ["dict", {name: form}].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .schema import is_int, require

Step = tuple[Any, ...]
Form = Any
MAX_DIMS = 8  # of an answer
RESIZE_MODES = ("bilinear", "bicubic", "nearest")
RESIZE = ("mode", "size", "scale", "align_corners")  # size: [h, w], "image" for that of the image, or null with a scale
OF_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
OF_DIMENSIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
}


def checked(steps: Iterable[Any], dims: int) -> tuple[Step, ...]:
    """The steps as tuples; FormatError where one does not fit an answer of so many dimensions, the batch among them."""
    found = []
    require(isinstance(steps, (list, tuple)), "tail is not a list")
    for step in steps:
        require(isinstance(step, (list, tuple)) and len(step) in (1, 2), f"tail: {step!r} is no step")
        name, *dim = step
        if name == "resize" and dim:
            found.append((name, _checked_resize(dim[0], dims)))
            continue
        require(
            isinstance(name, str) and name in (OF_DIMENSIONS if dim else OF_NUMBERS), f"tail: unknown step {step!r}"
        )
        require(not dim or (is_int(dim[0], 1) and dim[0] < dims), f"tail: {step!r} of an answer of {dims} dimensions")
        dims += (name == "unsqueeze") - (name == "squeeze")
        require(dims <= MAX_DIMS, f"tail: an answer of {dims} dimensions; at most {MAX_DIMS} are possible")
        found.append((name, *dim))
    return tuple(found)


def _checked_resize(how: Any, dims: int) -> dict[str, Any]:
    require(isinstance(how, Mapping) and set(how) == set(RESIZE) and dims == 4, f"tail: {how!r} is no resize of maps")
    require(how["mode"] in RESIZE_MODES, f"tail: unknown mode {how['mode']!r}")
    size, scale = how["size"], how["scale"]
    sized = size == "image" or (isinstance(size, list) and len(size) == 2 and all(is_int(n, 1) for n in size))
    scaled = isinstance(scale, list) and len(scale) == 2 and all(isinstance(f, float) and 0 < f < 1e6 for f in scale)
    require((sized and scale is None) or (scaled and size is None), f"tail: {how!r} has no size")
    require(how["align_corners"] in (None, True, False), f"tail: {how!r}: align_corners is damaged")
    return dict(how)


def checked_form(form: Any, readouts: int) -> Form:
    """The form of several outputs; FormatError where it is none, or leaves a readout out."""

    def numbers(part: Any) -> list[int]:
        if is_int(part, 0):
            return [part]
        require(isinstance(part, (list, tuple)) and len(part) == 2, f"outputs: {part!r} is no form")
        kind, inside = part
        known = isinstance(inside, Mapping) if kind == "dict" else isinstance(inside, list)
        require(known and kind in ("tuple", "list", "dict"), f"outputs: {part!r} is no form")
        return [n for p in (inside.values() if kind == "dict" else inside) for n in numbers(p)]

    require(set(numbers(form)) == set(range(readouts)), "outputs do not match the readouts")
    return form


def put_together(form: Form, values: Sequence[Any]) -> Any:
    """Values in the form of the model's outputs."""
    if isinstance(form, int):
        return values[form]
    kind, inside = form
    if kind == "dict":
        return {name: put_together(part, values) for name, part in inside.items()}
    found = [put_together(part, values) for part in inside]
    return tuple(found) if kind == "tuple" else found


def _resized(x: Tensor, how: Mapping[str, Any], image: Sequence[int]) -> Tensor:
    size = tuple(image[-2:]) if how["size"] == "image" else how["size"]
    options = {} if how["mode"] == "nearest" else {"align_corners": how["align_corners"]}
    maps: Tensor = F.interpolate(x.flatten(0, 1), size=size, scale_factor=how["scale"], mode=how["mode"], **options)
    return maps.unflatten(0, x.shape[:2])


def applied(steps: Iterable[Step], out: Tensor, image: Sequence[int]) -> Tensor:
    """The tail of answers [S, N, ...] on images of this shape."""
    exact = out.to(torch.float64)
    for name, *dim in steps:
        if name == "resize":
            exact = _resized(exact, dim[0], image)
            continue
        exact = OF_DIMENSIONS[name](exact, dim[0] + 1) if dim else OF_NUMBERS[name](exact)
    return exact.to(out.dtype)
