"""Expert-specialised fine-tuning: some experts of a mixture-of-experts model train, everything else stays as it is.

selection = molex.esft.select(model, batches)
tuning = molex.esft.tune(model, selection)
Trainer(model, ...).train()                # or any other
tuning.save("law/")                        # ESFT's folder: `molex serve` and `molex.esft.load` read it
tuning.revert()                            # the model as it was; or tuning.merge()
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molex.errors import ConfigError, StateError
from molex.esft.files import bound, read_folder, write_folder
from molex.esft.layers import ExpertLayer, find_layers, give_back, take_over
from molex.esft.selecting import Selection
from molex.esft.tuned import IMPLEMENTATION, TunedExperts


class Tuning:
    """The handle on a model whose chosen experts train. `model.save_pretrained` writes the originals; `save` writes the
    adapter, and after `merge` the model is a plain one."""

    def __init__(self, model: nn.Module, layers: dict[int, ExpertLayer], selection: Selection):
        self.model, self.layers, self.selection = model, layers, selection
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._configs: dict[int, Any] = {}  # of modules that were taken over, their own
        self._hook = model.register_load_state_dict_pre_hook(_Renamed(layers))
        model.requires_grad_(False)
        for number, layer in layers.items():
            layer.module.esft = TunedExperts(layer, selection.experts[number])
            self._configs[number] = take_over(layer.module, IMPLEMENTATION)

    def tuned(self, number: int) -> TunedExperts:
        """The copies of one decoder layer. Raises StateError after `revert` and `merge`."""
        self._check_alive()
        return self.layers[number].module.esft  # type: ignore[return-value]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training moves: the copies."""
        return [p for number in self.layers for p in self.tuned(number).parameters()]

    def save(self, folder: str | Path) -> None:
        """Writes expert_cfg.json and the experts, in the base's dtype, as forwards compute with them."""
        weights = {n: self.tuned(n).weights(layer.gate_up.dtype) for n, layer in self.layers.items()}
        write_folder(folder, self.layers, weights)

    def revert(self) -> nn.Module:
        """Gives the model back as it was: the same objects, the same values, requires_grad restored."""
        self._check_alive()
        self._hook.remove()
        for number, layer in self.layers.items():
            del layer.module.esft
            give_back(layer.module, self._configs.pop(number))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        return self.model

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Writes the copies over the originals and gives the model back, a plain one. The originals are lost."""
        for number, layer in self.layers.items():
            for expert, weights in self.tuned(number).weights(layer.gate_up.dtype).items():
                layer.gate_up[expert].copy_(weights.gate_up)
                layer.down[expert].copy_(weights.down)
        return self.revert()

    def _check_alive(self) -> None:
        if not self._configs:
            raise StateError("this tuning was reverted or merged: call molex.esft.tune or molex.esft.load again")


class _Renamed:
    """Trainers save by `save_pretrained`, which writes some architectures' tensors under the names of their first
    release, and resume by `load_state_dict`, not strict, which would then skip the copies in silence. Here they find
    their places; a state without them is refused."""

    def __init__(self, layers: Mapping[int, ExpertLayer]):
        self.names = {number: f"{layer.name}.esft." for number, layer in layers.items()}

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object) -> None:
        for number, name in self.names.items():
            for part in ("gate_up", "down"):
                ours, end = f"{prefix}{name}{part}", f".esft.{part}"
                theirs = [key for key in state_dict if key.endswith(end) and f".{number}." in key.removeprefix(prefix)]
                if not theirs:
                    raise StateError(
                        f"this state_dict has no {ours}: it is not of this tuning, and its experts would stay as they "
                        "are. molex.esft.load reads an adapter; revert before a base's weights are loaded"
                    )
                state_dict[ours] = state_dict.pop(theirs[0])


def tune(model: nn.Module, selection: Selection) -> Tuning:
    """Makes the chosen experts trainable and freezes everything else, in place. Make the optimizer after it.

    Raises StateError on a model that is being tuned already, ConfigError on layers and experts that it does not have.
    """
    layers = find_layers(model)
    taken = [layer.name for layer in layers.values() if hasattr(layer.module, "esft")]
    if taken:
        raise StateError(f"experts of {taken[0]} are being tuned already: save, then revert or merge that tuning first")
    if not selection.num_experts:
        raise ConfigError("the selection has no expert: nothing would train")
    for number, experts in selection.experts.items():
        if number not in layers:
            raise ConfigError(f"layer {number} has no experts here; layers with experts: {[*layers]}")
        size = layers[number].num_experts
        wrong = [expert for expert in experts if not 0 <= expert < size]
        if wrong or len(set(experts)) < len(experts):
            raise ConfigError(f"experts {experts} of layer {number}: give different numbers from 0 to {size - 1}")
    return Tuning(model, {n: layers[n] for n, experts in selection.experts.items() if experts}, selection)


def load(model: nn.Module, folder: str | Path) -> Tuning:
    """Puts a folder's experts in their places: to train them further, to try them, to merge them.

    Raises CheckpointError where the folder is damaged or is more than expert swaps, TargetError where it is for another
    base; then the model is as it was.
    """
    weights = bound(read_folder(folder), find_layers(model))
    tuning = tune(model, Selection({number: tuple(own) for number, own in weights.items()}))
    for number, own in weights.items():
        tuning.tuned(number).put(own)
    return tuning
