"""Operators that one decoder layer dispatches for one decoded token: launches are most of what a mixture costs there.

    TRITON_INTERPRET=1 python -m benchmarks.launches
    python -m benchmarks.launches --device cuda --dtype float32 --each

base      the frozen model
lora      PEFT's LoRA on all seven linears
molex     presets by backend, over the same linears (mixlora: experts on three, plain LoRA on four); `triton` needs a
          GPU or Triton's interpreter

Counted are torch operators, also those that run inside molex's own, and kernels: the operators that are neither a view
nor an allocation, and every launch by Triton. One of torch that launches several kernels (a top-k) counts as one. Waits
are answers that the host asks for, and lists that it sends: they stall a GPU, and a CUDA graph is not captured over
them. Counts do not depend on the sizes, where these are enough for Triton's kernels to split one token's sums.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import molex
from benchmarks.harness import write
from benchmarks.stack import LINEARS
from molex.errors import BackendError

MIXTURES = {
    "mola": ("dense", "preload", "triton"),
    "mixlora": ("dense", "preload", "triton"),
    "flylora": ("dense", "triton"),
    "smora": ("dense", "triton"),
}
NO_WORK = ("empty", "new_empty", "empty_like", "_unsafe_view", "lift_fresh", "device", "promote_types")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

Contestant = Callable[[LlamaForCausalLM], nn.Module]


class Calls(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        with self:  # inside one of molex's, what is made of others comes whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name, own = func.name().partition("::")[2].partition(".")[0], func.namespace == "molex"
        self.operators[name] += 1
        if not func.is_view and name not in NO_WORK and not own:
            self.kernels[name] += 1
        if name in WAITS or (name == "lift_fresh" and args[0].dim() > 0):
            self.waits[name] += 1
        return self._inside(func, args, kwargs) if own else func(*args, **kwargs)

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a custom operator so that what it calls is seen: its own code, past this mode."""
        key = getattr(torch._C.DispatchKey, args[0].device.type.upper())
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)

    @contextmanager
    def with_triton(self) -> Iterator["Calls"]:
        """Sees Triton's launches too, and not what its interpreter computes with in their place."""
        with ExitStack() as entered:
            if find_spec("triton") is not None:
                interface = import_module("triton.runtime.jit").KernelInterface
                entered.enter_context(patch.object(interface, "__getitem__", self._counting(interface.__getitem__)))
            yield entered.enter_context(self)

    def _counting(self, launcher: Callable[..., Any]) -> Callable[..., Any]:
        """launcher: (kernel, grid) -> what launches it, and what this returns too."""

        def launch(kernel: Any, grid: Any, *args: object, **kwargs: object) -> None:
            self.kernels[kernel.__name__] += 1
            self._launching = True
            launcher(kernel, grid)(*args, **kwargs)
            self._launching = False

        return lambda kernel, grid: partial(launch, kernel, grid)


def with_lora(model: LlamaForCausalLM) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=LINEARS))  # type: ignore[arg-type]


def with_mixture(model: LlamaForCausalLM, preset: str, backend: str) -> nn.Module:
    uniform = {"allocation": None} if preset == "mola" else {}
    molex.convert(model, molex.preset(preset, backend=backend, **uniform))
    return model


def contestants() -> dict[str, Contestant]:
    mixtures = {f"{p}, {b}": partial(with_mixture, preset=p, backend=b) for p, own in MIXTURES.items() for b in own}
    return {"base": lambda model: model, "lora": with_lora, **mixtures}


def decoded(make: Contestant, num_layers: int, arguments: argparse.Namespace) -> Calls:
    """What one token of a model of so many layers dispatches, in evaluation, after another token of the same text."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype))
    model = make(model.requires_grad_(False)).eval()
    token = torch.zeros(1, 1, dtype=torch.int64, device=arguments.device)
    with torch.no_grad():
        cache = model(input_ids=token).past_key_values
        model(input_ids=token, past_key_values=cache)
        with Calls().with_triton() as calls:
            model(input_ids=token, past_key_values=cache)
    return calls


def per_layer(make: Contestant, arguments: argparse.Namespace) -> dict[str, Counter[str]]:
    """What two decoder layers have more than one, by name."""
    one, two = decoded(make, 1, arguments), decoded(make, 2, arguments)
    return {kind: getattr(two, kind) - getattr(one, kind) for kind in ("operators", "kernels", "waits")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches of a decoding step, by decoder layer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--each", action="store_true", help="print the operators by name")
    arguments = parser.parse_args()
    row: dict[str, Any] = {"dtype": arguments.dtype, "operators": {}, "kernels": {}, "waits": {}}
    for name, make in contestants().items():
        try:
            counted = per_layer(make, arguments)
        except BackendError as error:
            print(f"without {name}: {error}", flush=True)
            continue
        for kind, calls in counted.items():
            row[kind][name] = calls.total()
        print(f"{name:20}", *(f"{calls.total():5} {kind}" for kind, calls in counted.items()), flush=True)
        if arguments.each:
            print(*(f"    {count:4} {operator}" for operator, count in counted["operators"].most_common()), sep="\n")
    write("launches", row)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # tiny models are told about their sizes
    main()
