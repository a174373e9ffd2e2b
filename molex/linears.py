"""What surgery asks of a base linear: its sizes, where it computes, and in which dtype experts beside it train."""

import torch
from torch import nn

from molex.distributed import whole_shape


def features(base: nn.Module) -> tuple[int, int] | None:
    """(in, out) of anything that acts as a linear; None for other modules."""
    if isinstance(getattr(base, "in_features", None), int) and isinstance(getattr(base, "out_features", None), int):
        return base.in_features, base.out_features  # type: ignore[return-value]
    if type(base).__name__ == "Conv1D" and isinstance(base.weight, torch.Tensor):
        num_in, num_out = whole_shape(base.weight)
        return num_in, num_out
    return None


class StandIn(nn.Module):
    """In the place of a base linear: models read these of their linears, whoever computes them."""

    base: nn.Module
    in_features: int
    out_features: int

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base, "bias", None)

    @property
    def nf(self) -> int:
        """What transformers' Conv1D calls its out-features."""
        return self.out_features


def hooked(module: nn.Module) -> bool:
    """Whether calling it is more than its class' forward: hooks, or a forward of its own, as accelerate gives it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def master_dtype(base: nn.Module) -> torch.dtype:
    """float32 over 16-bit and quantised bases; a wider base's own."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return torch.float32
    return torch.promote_types(weight.dtype, torch.float32)


def execution_device(base: nn.Module) -> torch.device:
    """Where the base computes: for offloaded modules, whose weights are elsewhere, accelerate's hook knows."""
    hook = getattr(base, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        device = getattr(candidate, "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = getattr(base, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")
