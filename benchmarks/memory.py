"""Peak memory of a training step: a converted model against PEFT's LoRA of as many columns, linear by linear.

    python -m benchmarks.memory [--dtype bfloat16] [--dropout 0.05] [--blame]
    python -m benchmarks.memory --device cuda --dtype bfloat16
    python -m benchmarks.memory --real --presets mixlora --dtype float32 --layers 1 --tokens 512

A step has the weights, AdamW's two moments, gradients and activations. On a GPU the peak is what was allocated; on a
CPU it is counted (`live_bytes.py`) on tensors without numbers, so that layers of an 8 B Llama's shape need no memory;
what takes its shapes from numbers, as whole blocks do there, needs --real ones.
PEFT keeps its factors in float32 and casts x to them, as it does by default; "lora, narrow" has the base's dtype.
"""

import argparse
import copy
import gc
from collections import Counter
from contextlib import nullcontext
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import molex
from benchmarks.harness import write
from benchmarks.live_bytes import Holder, LiveBytes, pretended
from benchmarks.stack import LINEARS, build, train_step
from molex.errors import BackendError

SIZES = {"num_experts": 8, "rank": 16}
RANKS = {"num_experts": 64}
PRESETS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 128, "targets": LINEARS},
    "mola": {**SIZES, "targets": LINEARS, "allocation": None},
    "mixlora": SIZES,
    "loramoe": {**SIZES, "targets": LINEARS, "localized_coefficient": 0.0},
    "dynmole": {**SIZES, "targets": LINEARS},
    "hydralora": {**SIZES, "targets": LINEARS},
    "smora": {**RANKS, "targets": LINEARS},
    "flylora": {**RANKS, "targets": LINEARS},
    "moram": {**RANKS, "targets": LINEARS},
}
LARGEST = 12  # holders that --blame prints


def without_mask(base: LlamaForCausalLM) -> None:
    """Has attention be causal without a mask, as transformers has it for text without padding once it has looked at the
    numbers, of which there are none here."""
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)
    base.set_attn_implementation("causal")


class Peak:
    """Bytes: resident (weights and moments), and what the step has at once beside them."""

    def __init__(self, resident: int, step: int, holders: Counter[Holder]):
        self.resident, self.step, self.holders = resident, step, holders

    @property
    def total(self) -> int:
        return self.resident + self.step


def peak_of(model: nn.Module, ids: Tensor, real: bool = False, named: bool = False) -> Peak:
    """named: holders know their module, by hooks, with which whole blocks are computed linear by linear."""
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    gc.collect()
    if ids.is_cuda:
        train_step(model, ids)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(model, ids)
        return Peak(weights + moments, torch.cuda.max_memory_allocated() - before, Counter())
    numbers = nullcontext() if real else pretended()
    with numbers, LiveBytes() as live, live.naming(model, short_name) if named else nullcontext():
        train_step(model, ids)
    return Peak(weights + moments, live.peak, live.holders())


def short_name(name: str) -> str:
    """The same for every layer, and for PEFT's wrapper."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("base_model", "model", "layers")]
    return ".".join(parts)


def converted(base: LlamaForCausalLM, name: str, backend: str, dropout: float) -> nn.Module:
    config = molex.preset(name, backend=backend, dropout=dropout, **PRESETS[name])
    molex.convert(base, config)
    return base


def lora_like(base: LlamaForCausalLM, mixture: Any, dropout: float, narrow: bool = False) -> nn.Module:
    """PEFT's LoRA on the same linears, each of as many ranks as its experts have together."""
    ranks = {name: sum(layer.experts.ranks) for name, layer in mixture.layers.items()}
    targets = [*ranks]
    config = peft.LoraConfig(r=8, rank_pattern=ranks, target_modules=targets, lora_dropout=dropout)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=not narrow)  # type: ignore[arg-type]


def measure(base: LlamaForCausalLM, name: str, ids: Tensor, arguments: argparse.Namespace) -> dict[str, Peak]:
    """PEFT's, and ours with each backend that runs here."""
    found: dict[str, Peak] = {}
    for backend in arguments.backends.split(","):
        model: Any = converted(copy.deepcopy(base), name, backend, arguments.dropout)
        if not found:
            for who, narrow in {"lora, C": False, "lora, narrow": True}.items():
                like = lora_like(copy.deepcopy(base), model.molex_mixture, arguments.dropout, narrow)
                found[who] = peak_of(like, ids, arguments.real)
        try:
            found[f"molex, {backend}"] = peak_of(model, ids, arguments.real, arguments.named)
        except BackendError as error:
            print(f"without {backend}: {error}", flush=True)
        except DynamicOutputShapeException:
            print(f"without {name}, {backend}: its shapes depend on numbers, use --real", flush=True)
    return found


def blame(found: dict[str, Peak]) -> None:
    """Prints what each has alive at its peak, largest first."""
    for name, peak in found.items():
        print(f"  {name}: {peak.step / 2**20:.0f} MiB in the step")
        for holder, num_bytes in peak.holders.most_common(LARGEST):
            print(f"    {num_bytes / 2**20:8.0f} MiB  {holder.operator} {holder.shape} {holder.dtype}  {holder.module}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step against PEFT's LoRA")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--backends", default="dense,preload")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--blame", action="store_true", help="print what is alive at the peaks (CPU)")
    parser.add_argument("--real", action="store_true", help="compute, too (CPU)")
    parser.add_argument("--named", action="store_true", help="and in which module: whole blocks are then taken apart")
    for size, default in {"hidden": 4096, "inner": 14336, "layers": 4, "tokens": 8192}.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    arguments = parser.parse_args()
    base, ids = build(arguments), torch.zeros(1, arguments.tokens, dtype=torch.int64, device=arguments.device)
    without_mask(base)
    sizes = {
        name: getattr(arguments, name) for name in ("device", "hidden", "inner", "layers", "tokens", "dtype", "dropout")
    }
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name in arguments.presets.split(","):
            found = measure(base, name, ids, arguments)
            lora = found["lora, C"]
            row: dict[str, Any] = {"preset": name, **sizes, "checkpointing": checkpointing}
            row["peak_gib"] = {who: round(peak.total / 2**30, 3) for who, peak in found.items()}
            row["times_lora"] = {who: round(peak.total / lora.total, 3) for who, peak in found.items()}
            row["step_times_lora"] = {who: round(peak.step / lora.step, 3) for who, peak in found.items()}
            write("memory", row)
            if arguments.blame:
                blame(found)


if __name__ == "__main__":
    main()
