"""Routers that know something before they are trained: rows from prompts' hidden states, or from experts' directions.

    from prompts   W = argmin ‖X Wᵀ − Y‖² + λ ‖W‖²     X what the router reads over all prompts, Y whose prompt it is
    from experts   row_e = ± v_e                       v_e the top right singular vector of B_e A_e, as Arrow's

The first is ridge regression, closed form, at what each router itself reads: a gate its linear's input while the
prompt's own expert is at work, X-LoRA's head the last hidden states of the base. With a large λ its rows become the
mean differences that mergekit sets its gates to. The second is Arrow (arXiv 2405.11157) without its |·|, which no
linear map can take: the sign is the one that texts at hand lean to.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError
from molex.layer import MixtureLinear
from molex.library import expert_names
from molex.mixture import Mixture
from molex.modes import evaluating
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
    ridge: float = 1e-3,
    sharpness: float = 4.0,
) -> None:
    """Sets the rows of `experts` (default: all that have prompts) so that prompts choose their own expert.

    prompts: by expert; two experts at least, so that there is something to tell apart. ridge: λ in units of the inputs'
    mean variance times their number. sharpness: by how much the right expert's score exceeds the others', on average.
    Raises ConfigError on unknown experts, on no prompts, where the router has no rows, and on encoder-decoders.
    """
    if not (ridge > 0 and math.isfinite(ridge) and math.isfinite(sharpness)):
        raise ConfigError(f"ridge={ridge} must be above 0, ridge and sharpness={sharpness} finite")
    routers, names = _routers(mixture), expert_names(mixture.layers)
    wanted = list(prompts) if experts is None else list(experts)
    _check_prompts(names, prompts, wanted)
    read = {expert: _inputs(mixture, tokenizer, texts, [*routers], expert) for expert, texts in prompts.items()}
    for name, router in routers.items():
        solved = fit_rows([inputs[name] for inputs in read.values()], ridge)
        rows = {names.index(e): sharpness * row_D for e, row_D in zip(read, solved, strict=True) if e in wanted}
        _set_rows(router, rows)


def fit_rows(groups: Sequence[Tensor], ridge: float) -> Tensor:
    """Ridge regression of which group (T_g, D) a token is in: (G, D), where a token's own group scores 1 above the mean
    of the others, on average."""
    x_TD = torch.cat([*groups]).double()
    own_T = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups])).to(x_TD.device)
    y_TG = torch.nn.functional.one_hot(own_T, len(groups)).double()
    y_TG -= y_TG.mean(0)
    penalty = ridge * x_TD.square().sum() / min(x_TD.shape)
    if x_TD.shape[0] > x_TD.shape[1]:
        gram_DD = x_TD.T @ x_TD
        rows_GD = torch.linalg.solve(gram_DD + penalty * torch.eye(len(gram_DD)).to(gram_DD), x_TD.T @ y_TG).T
    else:  # the same, by as many equations as there are tokens
        gram_TT = x_TD @ x_TD.T
        rows_GD = torch.linalg.solve(gram_TT + penalty * torch.eye(len(gram_TT)).to(gram_TT), y_TG).T @ x_TD
    scores_TG = x_TD @ rows_GD.T
    own = scores_TG.gather(1, own_T[:, None]).squeeze(1)
    margin = (own - (scores_TG.sum(1) - own) / (len(groups) - 1)).mean()
    return rows_GD / margin.clamp(min=1e-12)


def gates_from_experts(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, sharpness: float = 1.0
) -> None:
    """Sets the gates' rows from the experts' own strongest input directions.

    texts: any, to see which sign a direction leans to. sharpness: the scores' usual size. Raises ConfigError where
    layers have no gates of their own, or experts that are more than LoRAs.
    """
    routers = _routers(mixture)
    if not texts or _HEAD in routers:
        raise ConfigError("give texts, so that directions get a sign; and a router with a gate for each layer")
    for name, x_TD in _inputs(mixture, tokenizer, texts, [*routers], None).items():
        bank, rows = mixture.layers[name].experts, {}
        size = sharpness * (x_TD.shape[1] / x_TD.square().sum(1).mean().clamp(min=1e-12)) ** 0.5
        for expert_id in range(bank.num_experts):
            lora = bank.expert(expert_id)
            direction_D = top_direction(lora.A, lora.B).to(x_TD)
            rows[expert_id] = size * direction_D * (1 if float((x_TD @ direction_D).mean()) >= 0 else -1)
        _set_rows(routers[name], rows)


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


def _inputs(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str], expert: str | None
) -> dict[str, Tensor]:
    """What routers read (T, D), padding left out, while one expert, or the base alone, runs over the texts."""
    model, (*others, stack) = mixture.model, find_stacks(mixture.model)
    if others:
        raise ConfigError("prompts alone are no input of an encoder-decoder; train its gates instead")
    batch = tokenizer(list(texts), padding=True, return_tensors="pt").to(next(model.parameters()).device)
    real_T = batch["attention_mask"].flatten().bool()
    seen: dict[str, Tensor] = {}
    no_expert = expert is None or _HEAD in names

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.reshape(-1, x.shape[-1])[real_T.to(x.device)].float()

    def keep_input(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MixtureLinear)
        keep(layer.name, args[0])

    hooks = [mixture.layers[name].register_forward_pre_hook(keep_input) for name in names if name != _HEAD]
    hooks.append(stack.module.register_forward_hook(lambda module, args, output: keep(_HEAD, output[0])))
    try:
        with evaluating(model), mixture.disabled() if no_expert else mixture.using(adapters=expert):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: seen[name] for name in names}


@torch.no_grad()
def _set_rows(router: Router, rows: Mapping[int, Tensor]) -> None:
    """Rows (D,) by expert."""
    rows_GED = router.rows()
    for expert_id, row_D in rows.items():
        if expert_id < rows_GED.shape[1]:
            rows_GED[:, expert_id] = row_D.to(rows_GED)
