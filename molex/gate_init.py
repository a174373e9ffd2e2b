"""Gates that know something before they are trained: rows from prompts' hidden states, or from the experts' directions.

    from prompts   row_e = c · (μ_e − μ) / ‖μ_e − μ‖        μ_e the mean input over e's own prompts, μ over everyone's
    from experts   row_e = c · ± v_e                        v_e the top right singular vector of B_e A_e, as Arrow's

c = sharpness · √D / rms ‖x‖ makes logits of unit size whatever the layer's input is. The first is mergekit's
hidden-state gate, taken at each gate's own input instead of the residual stream; the second is Arrow (arXiv
2405.11157) without its |·|, which a linear gate cannot take: the sign is the one that texts at hand lean to.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError
from molex.layer import MixtureLinear
from molex.library import expert_names
from molex.mixture import Mixture
from molex.routers import GatedRouter
from molex.routers.arrow import top_direction


def gates_from_prompts(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[str]],
    *,
    experts: Sequence[str] | None = None,
    sharpness: float = 1.0,
) -> None:
    """Sets the gates' rows of `experts` (default: all that have prompts) from what the base makes of their prompts.

    prompts: by expert; two experts at least, so that there is something to tell apart. Raises ConfigError on unknown
    experts, on no prompts, and where the mixture has no gates.
    """
    gated = _gated(mixture)
    wanted = list(prompts) if experts is None else list(experts)
    _check_prompts(expert_names(mixture.layers), prompts, wanted)
    means: dict[str, dict[str, Tensor]] = {name: {} for name in gated}
    squares = dict.fromkeys(gated, 0.0)
    for expert, texts in prompts.items():
        for name, x_TD in _inputs(mixture, tokenizer, texts, gated):
            means[name][expert] = x_TD.mean(0)
            squares[name] += float(x_TD.square().sum(1).mean()) / len(prompts)
    for name, router in gated.items():
        middle_D = torch.stack([*means[name].values()]).mean(0)
        rows = {expert: means[name][expert] - middle_D for expert in wanted}
        _set_rows(mixture.layers[name], router, rows, squares[name], sharpness)


def gates_from_experts(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, sharpness: float = 1.0
) -> None:
    """Sets the gates' rows from the experts' own strongest input directions.

    texts: any, to see which sign a direction leans to. Raises ConfigError where the mixture has no gates, or its
    experts are more than LoRAs.
    """
    gated = _gated(mixture)
    if not texts:
        raise ConfigError("texts is empty; give some, so that directions get a sign")
    for name, x_TD in _inputs(mixture, tokenizer, texts, gated):
        layer = mixture.layers[name]
        rows = {}
        for expert_id, expert in enumerate(layer.experts.names):
            lora = layer.experts.expert(expert_id)
            direction_D = top_direction(lora.A, lora.B).to(x_TD)
            rows[expert] = direction_D * (1 if float((x_TD @ direction_D).mean()) >= 0 else -1)
        _set_rows(layer, gated[name], rows, float(x_TD.square().sum(1).mean()), sharpness)


def _gated(mixture: Mixture) -> dict[str, GatedRouter]:
    found = {name: layer.router for name, layer in mixture.layers.items() if isinstance(layer.router, GatedRouter)}
    if not found:
        raise ConfigError(f"{mixture.config.method} has no gates to set: its router scores experts in another way")
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
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Mapping[str, object]
) -> Iterator[tuple[str, Tensor]]:
    """What the named layers read (T, D), padding left out, while the base alone runs over the texts."""
    model = mixture.model
    batch = tokenizer(list(texts), padding=True, return_tensors="pt").to(next(model.parameters()).device)
    seen: dict[str, Tensor] = {}
    real_T = batch["attention_mask"].flatten().bool()

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MixtureLinear)
        x = args[0]
        seen[layer.name] = x.reshape(-1, x.shape[-1])[real_T.to(x.device)].float()

    hooks = [mixture.layers[name].register_forward_pre_hook(watch) for name in names]
    was_training = model.training
    try:
        with mixture.disabled():
            model.eval()(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    yield from seen.items()


@torch.no_grad()
def _set_rows(
    layer: MixtureLinear, router: GatedRouter, rows: Mapping[str, Tensor], square: float, sharpness: float
) -> None:
    weight_ED = router.gate.weight
    size = sharpness * (weight_ED.shape[1] / max(square, 1e-12)) ** 0.5
    for expert, row_D in rows.items():
        if expert in layer.experts.names:
            unit_D = row_D / row_D.norm().clamp(min=1e-12)
            weight_ED[layer.experts.names.index(expert)] = (size * unit_D).to(weight_ED)
