"""What a module runs besides the forward of its class: wrappers, hooks, and methods replaced on the object.

A converted network runs none of it. Wrappers are taken off, and hooks that make a parameter of others, as weight_norm,
spectral_norm and pruning do, are asked for that parameter. All else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from ..errors import ConversionError


def wrapped(m: nn.Module) -> nn.Module | None:
    """The network inside of what runs it on several devices, compiled, or as an average over the training."""
    if isinstance(m, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return m.module
    if not type(m).__module__.startswith("torch._dynamo"):  # whose class takes a second to import
        return None
    return m.get_submodule("_orig_mod")


def _replaced(module: nn.Module) -> str | None:
    """The method of a forward that was replaced on the object."""
    return next((name for name in ("forward", "_conv_forward") if name in vars(module)), None)


def _foreign_hooks(module: nn.Module) -> list[Any]:
    """Forward hooks, but those of this package and those that make a parameter, as weight_norm and pruning do."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = __name__.partition(".")[0]
    return [h for h in hooks if not getattr(h, "__module__", "").startswith(own) and makes_parameter(h) is None]


def is_patched(module: nn.Module) -> bool:
    """Whether a module does something else than its class says."""
    return bool(_replaced(module) or _foreign_hooks(module))


def refuse_hooks(module: nn.Module, name: str) -> None:
    """ConversionError where a module has hooks or a forward of its own, which the converted network would not run."""
    if (own := _replaced(module)) and wrapped(module) is None:
        raise ConversionError(
            f"{name}: its {own} was replaced on the object, which the converted network would not run. Remedy: give "
            f"the class that {own} (of a module of your own, not of torch.nn), or put the original back"
        )
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise ConversionError(
            "there are forward hooks on all modules (register_module_forward_hook), which the converted network would "
            "not run. Remedy: remove them (handle.remove()) before it is converted"
        )
    made = {makes_parameter(hook) for hook in module._forward_pre_hooks.values()}
    loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor) and key not in made]
    if loose and type(module).__module__.partition(".")[0] == "torch":
        raise ConversionError(
            f"{name}: its {loose[0]} is a tensor that is neither a parameter nor a buffer, which PyTorch does not save "
            f"or move. Remedy: {name}.register_buffer({loose[0]!r}, tensor), or nn.Parameter(tensor)"
        )
    for hook in _foreign_hooks(module):
        what = getattr(hook, "__qualname__", type(hook).__name__)
        raise ConversionError(
            f"{name}: has a forward hook ({what}), which the converted network would not run. Remedy: remove it "
            "(handle.remove()), or do its work in the forward of a module"
        )


def makes_parameter(hook: Any) -> str | None:
    """The parameter that a pre-hook of torch makes of others before each forward; None where it makes none."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return str(hook.name)
    return str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else None


@contextlib.contextmanager
def made_parameters_kept(model: nn.Module) -> Iterator[None]:
    """What such hooks made is detached meanwhile, so that it can be copied, and put back after whatever runs makes."""
    hooks = [(m, hook) for m in model.modules() for hook in m._forward_pre_hooks.values()]
    made = [(m, name, getattr(m, name)) for m, hook in hooks if (name := makes_parameter(hook))]
    for m, name, value in made:
        setattr(m, name, value.detach())
    try:
        yield
    finally:
        for m, name, value in made:
            setattr(m, name, value)


def parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter as the next forward will see it.

    Under torch's hook-based weight_norm, spectral_norm and pruning the attribute is what the last forward made, which
    may have been before the weights were loaded.
    """
    for hook in module._forward_pre_hooks.values():
        if makes_parameter(hook) != name:
            continue
        if isinstance(hook, WeightNorm):
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(module, do_power_iteration=False)
        assert isinstance(hook, BasePruningMethod)
        return hook.apply_mask(module)
    found: torch.Tensor | None = getattr(module, name)
    return found
