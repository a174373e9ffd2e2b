"""What surgery hangs on a model's calls, all of it removed again by `revert`.

Every stack tells the mixture's state about its tokens, and after its first forward names the converted layers that were
never called. A state-space mixer is kept off its fused path. Hooks are objects, so that a deep copy of the
model calls the copy's state.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molex.errors import StateError, TargetError
from molex.layer import MixtureLinear
from molex.library import expert_names
from molex.state import MixtureState
from molex.tokens import Stack, bound_arguments

logger = logging.getLogger("molex")


def watch_calls(model: nn.Module, stacks: tuple[Stack, ...], state: MixtureState) -> list[RemovableHandle]:
    """Lets the state know of every forward, and checks the first one."""
    handles = []
    for stack in stacks:
        handles.append(stack.module.register_forward_pre_hook(_Entrance(state, stack.kind), with_kwargs=True))
        handles.append(stack.module.register_forward_hook(_Unseen(state, stack.name)))
        handles.append(stack.module.register_forward_hook(_Exit(state)))
    if len(stacks) == 1 and stacks[0].name:
        handles.append(model.register_forward_hook(_Unseen(state, "")))
    return handles


def leave_fused_paths(model: nn.Module, layers: Iterable[str]) -> list[RemovableHandle]:
    """Turns off the fused path of every state-space mixer that holds a converted layer."""
    parents = {name: model.get_submodule(name) for name in sorted({layer.rpartition(".")[0] for layer in layers})}
    mixers = [module for module in parents.values() if isinstance(getattr(module, "conv1d", None), nn.Module)]
    handles = [mixer.register_forward_pre_hook(_leave_fused_path) for mixer in mixers]
    return handles + [mixer.register_forward_hook(_restore_training, always_call=True) for mixer in mixers]


def refuse_base_names(model: nn.Module, layers: Iterable[str]) -> RemovableHandle:
    """Has `model.load_state_dict` refuse a base's weights: not strict, as stock trainers call it when they resume, it
    would skip every converted layer and leave its experts as they are."""
    return model.register_load_state_dict_pre_hook(_BaseNames(layers))


def tell_of_empty_slots(stack: Stack, layers: Mapping[str, MixtureLinear]) -> RemovableHandle:
    """Warns at the first forward in training of frozen experts that nobody has loaded."""
    return stack.module.register_forward_pre_hook(_EmptySlots(layers))


class _EmptySlots:
    """A router over experts that are zero and stay so learns nothing, without any other sign."""

    def __init__(self, layers: Mapping[str, MixtureLinear]):
        self.layers, self.told = layers, False

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.told or not module.training:
            return
        self.told = True
        empty = [name for number, name in enumerate(expert_names(self.layers)) if name == str(number)]
        if empty:
            logger.warning(
                "experts %s are frozen and were never loaded, so they add nothing: call mixture.load_expert first, or "
                "convert with train_experts=True",
                ", ".join(empty),
            )


class _BaseNames:
    """Raises StateError where a state_dict has converted layers under their base's names."""

    def __init__(self, layers: Iterable[str]):
        self.layers = list(layers)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object) -> None:
        plain = [name for name in self.layers if f"{prefix}{name}.weight" in state_dict]
        if plain:
            raise StateError(
                f"this state_dict is a base's: {plain[0]} is a mixture layer here and would stay as it is. "
                "molex.load reads a mixture; the trainers of molex.training resume one"
            )


class _Entrance:
    """A stack's forward starts."""

    def __init__(self, state: MixtureState, kind: str):
        self.state, self.kind = state, kind

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.begin(self.kind, module.training, bound_arguments(module, args, kwargs))


class _Exit:
    """A stack's forward ends, at the tensors it returns: a loss may read any of them."""

    def __init__(self, state: MixtureState):
        self.state = state

    def __call__(self, module: nn.Module, args: object, output: Any) -> None:
        if isinstance(output, Tensor):
            self.state.mark(output)
        elif isinstance(output, Mapping | tuple | list):
            for part in output.values() if isinstance(output, Mapping) else output:
                self(module, args, part)


class _Unseen:
    """A layer whose weight the model reads directly would be trained in vain."""

    def __init__(self, state: MixtureState, prefix: str):
        self.state, self.prefix = state, prefix

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if not self.state.unseen or (module.training and _skips_layers(module)):
            return
        names = sorted(name for name in self.state.unseen if not self.prefix or name.startswith(f"{self.prefix}."))
        if names:
            raise TargetError(
                f"{len(names)} converted layers were never called in this forward, so training them would do nothing: "
                f"{', '.join(names[:5])}. The model reads their weights directly; leave them out of targets"
            )


def _skips_layers(module: nn.Module) -> bool:
    """Whether LayerDrop may have left layers out."""
    config = getattr(module, "config", None)
    return any(getattr(config, f"{part}layerdrop", 0) for part in ("", "encoder_", "decoder_"))


def _leave_fused_path(mixer: nn.Module, args: object) -> None:
    """A Mamba mixer in training hands its linears' weights to one fused kernel, past their experts; it does so only
    where its own flag says training (its linears keep theirs)."""
    mixer.training = False


def _restore_training(mixer: nn.Module, args: object, output: object) -> None:
    mixer.training = mixer.conv1d.training  # type: ignore[union-attr, assignment]
