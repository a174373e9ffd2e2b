"""A merged LoRA into the weights of a model in memory:  W <- W + s B A, in float32, then in the weight's own dtype.

Everything is checked before the first weight changes: linears that are absent or of another size, weights that another
module shares, that are quantised, sharded or offloaded, are refused by name.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from molex.errors import TargetError
from molex.experts import LoRA
from molex.io.fitting import check_present
from molex.library import Factors
from molex.linears import features

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Sizes = Mapping[str, tuple[int, int]]  # (in, out) of linears, by name


def fold(model: nn.Module, factors: Factors) -> None:
    """Adds a LoRA to each linear's weight, in place. Raises TargetError, with nothing changed, as the module says."""
    linears = find_linears(model, sizes_of(factors))
    for name, linear in linears.items():
        check_writable(name, linear)
    for name, lora in factors.items():
        add_to(linears[name].weight, lora, transposed(linears[name]))  # type: ignore[arg-type]


@torch.no_grad()
def add_to(weight: Tensor, lora: LoRA, is_transposed: bool) -> None:
    """weight (O, D), or (D, O), plus the update; rounded once, to the weight's dtype."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, right = lora.scale * lora.B.to(wide), lora.A.to(wide)
    if is_transposed:
        left, right = right.T, left.T
    wide.addmm_(left, right)
    if wide.data_ptr() != weight.data_ptr():
        weight.copy_(wide)


def sizes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear that has a LoRA."""
    return {name: (lora.A.shape[1], lora.B.shape[0]) for name, lora in factors.items()}


def find_linears(model: nn.Module, sizes: Sizes) -> dict[str, nn.Module]:
    """The linears of these names. Raises TargetError on one that is absent, of another size, or shares its weight."""
    modules = dict(model.named_modules())
    check_present(sizes, modules, "adapters change")
    for name, size in sizes.items():
        here = features(modules[name])
        if here != size:
            raise TargetError(f"{name} is adapted as a linear {size[0]} -> {size[1]}, here it is {here}: another base")
    refuse_twins(model, [f"{name}.weight" for name in sizes])
    return {name: modules[name] for name in sizes}


def refuse_twins(model: nn.Module, changed: Iterable[str]) -> None:
    """Raises TargetError where a parameter that is to change is another's too: tied embeddings, shared blocks."""
    first_at: dict[int, str] = {}
    twins: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_at.setdefault(id(parameter), name)
        if first != name:
            twins |= {first: name, name: first}
    for name in changed:
        if name in twins:
            raise TargetError(f"{name} and {twins[name]} are one parameter: a merge would change both; leave it out")


def check_writable(name: str, linear: nn.Module) -> None:
    """Raises TargetError where a linear's weight is no plain float matrix in this process's memory."""
    weight = getattr(linear, "weight", None)
    plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.dtype in _DTYPES
    if not plain or weight is None:
        raise TargetError(f"{name} is quantised or sharded ({type(linear).__name__}): merge into the base before that")
    if weight.is_meta or weight.dim() != 2:
        raise TargetError(f"{name} is offloaded or sharded: load the base without, or merge its folder: out=...")


def transposed(linear: nn.Module) -> bool:
    """Whether the weight lies as (D, O): transformers' Conv1D."""
    return type(linear).__name__ == "Conv1D"
