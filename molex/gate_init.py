"""Routers that know something before they are trained: rows from prompts' hidden states, or from experts' directions.

    from prompts   row_e = c · (μ_e − μ) / ‖μ_e − μ‖        μ_e the mean input over e's own prompts, μ over everyone's
    from experts   row_e = c · ± v_e                        v_e the top right singular vector of B_e A_e, as Arrow's

c = sharpness · √D / rms ‖x‖ makes scores of unit size whatever a router reads. The first is mergekit's hidden-state
gate, taken at what each router itself reads: a gate its linear's input, X-LoRA's head the last hidden states. The
second is Arrow (arXiv 2405.11157) without its |·|, which no linear map can take: the sign is the one that texts at hand
lean to.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError
from molex.layer import MixtureLinear
from molex.library import expert_names
from molex.mixture import Mixture
from molex.routers import Router
from molex.routers.arrow import top_direction
from molex.tokens import find_stacks

_HEAD = ""  # in the place of a layer's name


def gates_from_prompts(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[str]],
    *,
    experts: Sequence[str] | None = None,
    sharpness: float = 1.0,
) -> None:
    """Sets the rows of `experts` (default: all that have prompts) from what the base makes of their prompts.

    prompts: by expert; two experts at least, so that there is something to tell apart. Raises ConfigError on unknown
    experts, on no prompts, and where the router has no rows.
    """
    routers = _routers(mixture)
    wanted = list(prompts) if experts is None else list(experts)
    _check_prompts(expert_names(mixture.layers), prompts, wanted)
    read = {expert: _inputs(mixture, tokenizer, texts, [*routers]) for expert, texts in prompts.items()}
    for name, router in routers.items():
        means = {expert: inputs[name].mean(0) for expert, inputs in read.items()}
        middle_D = torch.stack([*means.values()]).mean(0)
        square = sum(float(inputs[name].square().sum(1).mean()) for inputs in read.values()) / len(read)
        rows = {expert_names(mixture.layers).index(expert): means[expert] - middle_D for expert in wanted}
        _set_rows(router, rows, square, sharpness)


def gates_from_experts(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, sharpness: float = 1.0
) -> None:
    """Sets the gates' rows from the experts' own strongest input directions.

    texts: any, to see which sign a direction leans to. Raises ConfigError where layers have no gates of their own, or
    experts that are more than LoRAs.
    """
    routers = _routers(mixture)
    if not texts or _HEAD in routers:
        raise ConfigError("give texts, so that directions get a sign; and a router with a gate for each layer")
    for name, x_TD in _inputs(mixture, tokenizer, texts, [*routers]).items():
        bank, rows = mixture.layers[name].experts, {}
        for expert_id in range(bank.num_experts):
            lora = bank.expert(expert_id)
            direction_D = top_direction(lora.A, lora.B).to(x_TD)
            rows[expert_id] = direction_D * (1 if float((x_TD @ direction_D).mean()) >= 0 else -1)
        _set_rows(routers[name], rows, float(x_TD.square().sum(1).mean()), sharpness)


def _routers(mixture: Mixture) -> dict[str, Router]:
    """What scores experts, by the layer it stands in. Raises ConfigError where that is no linear map."""
    if mixture.head is not None:
        found: dict[str, Router] = {_HEAD: mixture.head}
    else:
        routed = {name: layer.router for name, layer in mixture.layers.items() if not layer.plain}
        found = {name: router for name, router in routed.items() if router is not None}
    for router in found.values():
        router.rows()
    return found


def _check_prompts(names: list[str], prompts: Mapping[str, Sequence[str]], wanted: list[str]) -> None:
    unknown = [name for name in (*prompts, *wanted) if name not in names]
    if unknown:
        raise ConfigError(f"no expert {unknown[0]!r}; this mixture has: {', '.join(names)}")
    empty = [name for name in {*prompts, *wanted} if not prompts.get(name) or isinstance(prompts[name], str)]
    if empty or len(prompts) < 2:
        lacking = f"; no list for {', '.join(sorted(empty))}" if empty else ""
        raise ConfigError(f"give a list of prompts for each of two or more experts{lacking}")


@torch.no_grad()
def _inputs(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str]
) -> dict[str, Tensor]:
    """What routers read (T, D), padding left out, while the base alone runs over the texts."""
    model, stack = mixture.model, find_stacks(mixture.model)[-1].module
    batch = tokenizer(list(texts), padding=True, return_tensors="pt").to(next(model.parameters()).device)
    real_T = batch["attention_mask"].flatten().bool()
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.reshape(-1, x.shape[-1])[real_T.to(x.device)].float()

    def keep_input(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MixtureLinear)
        keep(layer.name, args[0])

    hooks = [mixture.layers[name].register_forward_pre_hook(keep_input) for name in names if name != _HEAD]
    hooks.append(stack.register_forward_hook(lambda module, args, output: keep(_HEAD, output[0])))
    was_training = model.training
    try:
        with mixture.disabled():
            model.eval()(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: seen[name] for name in names}


@torch.no_grad()
def _set_rows(router: Router, rows: Mapping[int, Tensor], square: float, sharpness: float) -> None:
    """Rows (D,) by expert; square: the mean of ‖x‖² over tokens."""
    rows_GED = router.rows()
    size = sharpness * (rows_GED.shape[-1] / max(square, 1e-12)) ** 0.5
    for expert_id, row_D in rows.items():
        if expert_id < rows_GED.shape[1]:
            rows_GED[:, expert_id] = (size * row_D / row_D.norm().clamp(min=1e-12)).to(rows_GED)
