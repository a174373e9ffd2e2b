"""Decoder layers of an 8 B Llama's shape: a training step and a decoding step, by tokens a second and peak memory.

    python -m benchmarks.stack --device cuda --dtype bfloat16
    python -m benchmarks.stack --hidden 64 --inner 128 --layers 2 --tokens 64 --rounds 5

base      the frozen model; its training step is forward and the gradient of its input, as below an adapter
lora      PEFT's LoRA on all seven linears, of as many ranks as a token uses; "lora, C" of as many as there are
molex     MoLA's router and experts on all seven linears, with each backend, or what the planner picks (auto)
loop, meteora, every_expert, scattermoe     the same experts and gates as other codes compute them: `linears.py`

Training is forward and backward of one sequence, without the optimizer. Decoding is one token without a cache, as a
whole model's latency grows with its launches: as it is, and on a GPU captured in a CUDA graph, where that is possible.
Before, every mixture must agree with the reference backend in float64: logits, also in evaluation, and each gradient.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import molex
from benchmarks.harness import in_graphs, interleave, ratios, summary, write
from benchmarks.linears import Way, replace, ways
from benchmarks.problem import side_by_side
from molex.errors import BackendError
from molex.kernels import backends

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden": 4096, "inner": 14336, "layers": 4, "tokens": 8192, "experts": 8, "rank": 16, "top_k": 2}
UNFIT = ("reference", "megablocks")  # for tests alone; bfloat16 alone, where models are checked in float32
CHECKED_TOKENS, TOLERANCE = 32, 2e-3  # relative RMS error in float32, which a GPU's kernels may multiply as TF32


def build(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """The frozen base. Its embeddings' output asks for a gradient, as if there were layers to train below."""
    heads = max(1, arguments.hidden // 128)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=1024,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).requires_grad_(False)
    model.enable_input_require_grads()
    return model


def with_lora(base: LlamaForCausalLM, rank: int) -> nn.Module:
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS))  # type: ignore[arg-type]
    return awake(model)


def with_experts(base: LlamaForCausalLM, arguments: argparse.Namespace, backend: str) -> nn.Module:
    settings = {"num_experts": arguments.experts, "rank": arguments.rank, "top_k": arguments.top_k}
    config = molex.preset("mola", targets=LINEARS, allocation=None, dropout=0.0, backend=backend, **settings)
    torch.manual_seed(0)
    molex.convert(base, config)
    return awake(base)


def with_way(base: LlamaForCausalLM, arguments: argparse.Namespace, way: Way) -> nn.Module:
    return replace(with_experts(base, arguments, "dense").molex_mixture, way)  # type: ignore[arg-type]


def awake(model: nn.Module) -> nn.Module:
    """B is zero at the start, with which a GPU multiplies faster, and a wrong result is not seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def contestants(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Every model that runs here; of the others the reason is printed."""
    used, stored = arguments.top_k * arguments.rank, arguments.experts * arguments.rank
    base = build(arguments)
    made: dict[str, nn.Module] = {"base": base}
    made |= {"lora": with_lora(copy.deepcopy(base), used), "lora, C": with_lora(copy.deepcopy(base), stored)}
    for backend in ("auto", *(name for name in backends if name not in UNFIT)):
        model = with_experts(copy.deepcopy(base), arguments, backend)
        if runs(model, backend, arguments.device):
            made[f"molex, {backend}"] = model
    others = ways(arguments.device, getattr(torch, arguments.dtype))
    return made | {name: with_way(copy.deepcopy(base), arguments, way) for name, way in others.items()}


def runs(model: nn.Module, backend: str, device: str) -> bool:
    """Whether a backend takes the model there; if not, the reason is printed."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.int64, device=device))
    except BackendError as error:
        print(f"without {backend}: {error}", flush=True)
        return False
    return True


def check(models: Mapping[str, nn.Module], arguments: argparse.Namespace) -> None:
    """Refuses to time a mixture that is wrong. In float32: in a narrower type the gates may choose otherwise."""
    ids = torch.randint(0, 1024, (1, CHECKED_TOKENS), device=arguments.device)
    truth = results(with_experts(build(arguments), arguments, "reference").double(), ids)
    for name in models.keys() - {"base", "lora", "lora, C"}:
        compare(name, results(copy.deepcopy(models[name]).float(), ids), truth)


def compare(name: str, found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Raises AssertionError unless each tensor has a small relative error."""
    assert found.keys() == truth.keys(), f"{name}: {found.keys() ^ truth.keys()}"
    for what, value in found.items():
        error = (value - truth[what]).norm() / truth[what].norm()
        assert error < TOLERANCE, f"{name}, {what}: relative error {error:.2g}"


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """By name, in float64: the logits in training and in evaluation, and every gradient."""
    output = model(input_ids=ids, labels=ids, use_cache=False)
    found = {"logits": output.logits.detach().double(), **gradients(model, output.loss)}
    with torch.no_grad():
        found["logits in evaluation"] = model.eval()(input_ids=ids, use_cache=False).logits.double()
    return found


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """In float64, by the parameter's name, which is the same in every kind of model."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, [*named.values()])
    short = (name.replace("experts.", "").replace("router.gate.weight", "gate") for name in named)
    return side_by_side({name: grad.double() for name, grad in zip(short, grads, strict=True)})


def train_step(model: nn.Module, ids: Tensor) -> None:
    mixture: Any = getattr(model, "molex_mixture", None)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss if mixture is None else loss + mixture.aux_loss()).backward()
    model.zero_grad(set_to_none=True)


def decode_step(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def peak_gib(model: nn.Module, step: Callable[[], object]) -> float:
    """Of a step, with the model's own weights, without the other models'."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    own = sum(parameter.nbytes for parameter in model.parameters())
    return round((torch.cuda.max_memory_allocated() - before + own) / 2**30, 3)


def report(
    what: str, steps: Mapping[str, Callable[[], object]], num_tokens: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    warmup = 10 if arguments.device == "cuda" else 2
    times = interleave(steps, arguments.rounds, warmup, arguments.device, arguments.seconds)
    row = {key: value for key, value in vars(arguments).items() if key not in ("threads", "seconds")}
    row |= {"rounds": len(times["base"]), "timed": what}
    row["tokens_per_second"] = {n: summary([num_tokens / t for t in own]) for n, own in times.items()}
    row["times_base"] = {name: ratios(own, times["base"]) for name, own in times.items() if name != "base"}
    return row


def read_arguments(description: str, sizes: Mapping[str, int], rounds: int, seconds: float) -> argparse.Namespace:
    """What to build, and for how long to time each row of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=seconds, help="for each row, once there are a few rounds")
    for name, size in {**sizes, "rounds": rounds, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    arguments = read_arguments("Decoder layers with experts against their base", SIZES, rounds=20, seconds=20.0)
    models = contestants(arguments)
    check(models, arguments)
    ids = torch.randint(0, 1024, (1, arguments.tokens), device=arguments.device)
    steps = {name: partial(train_step, model, ids) for name, model in models.items()}
    row = report("training", steps, ids.numel(), arguments)
    if arguments.device == "cuda":
        row["peak_gib"] = {name: peak_gib(models[name], step) for name, step in steps.items()}
    write("stack", row)
    one = {name: partial(decode_step, model.eval(), ids[:, :1]) for name, model in models.items()}
    write("stack", report("decoding", one, 1, arguments))
    if arguments.device == "cuda":
        write("stack", report("decoding, CUDA graph", in_graphs(one), 1, arguments))


if __name__ == "__main__":
    main()
