"""Stacks: the modules whose calls say which tokens a model's layers see.

One in most models, the stack of layers under the head ("model"); two in an encoder-decoder. Layers outside of them,
such as a vision tower's, have tokens of their own (""), of which only the shape is known.
"""

from dataclasses import dataclass

from torch import nn

_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")


@dataclass(frozen=True)
class Stack:
    """One stack: what it is called here, its name in the model, the module."""

    kind: str  # "model", "encoder" or "decoder"
    name: str
    module: nn.Module

    def holds(self, layer: str) -> bool:
        """Whether a module of this name lies in the stack."""
        return not self.name or layer.startswith(f"{self.name}.")


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model; a module that is no transformers model is its own."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    named = {module: name for name, module in model.named_modules()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()  # type: ignore[operator]
        if model not in (encoder, decoder):
            return Stack("encoder", named[encoder], encoder), Stack("decoder", named[decoder], decoder)
    return (Stack("model", named[decoder], decoder),)


def stack_of(stacks: tuple[Stack, ...], layer: str) -> str:
    """Whose tokens a layer sees. Keys and values of cross-attention see the encoder's."""
    kind = next((stack.kind for stack in stacks if stack.holds(layer)), "")
    parts = layer.split(".")
    crosses = any(part in _CROSS_ATTENTION for part in parts) and parts[-1] in _KEYS_AND_VALUES
    return "encoder" if kind == "decoder" and crosses else kind
