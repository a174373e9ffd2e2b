"""Where tokens of each kind went: layers by experts, one panel for each label (a skill, a task, a domain).

    load_e    share of the chosen slots that expert e served (sums to 1); even for all where the routing is dense
    weight_e  mean gate weight of expert e over tokens

Padding is left out of both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molex.checks import check_choice
from molex.errors import ConfigError, TargetError
from molex.evaluation.figures import new_figure, write_figure
from molex.evaluation.gates import routed_layers
from molex.mixture import Mixture
from molex.modes import evaluating
from molex.stats import expert_gates

Measure = Literal["load", "weight"]
Panel = Mapping[str, Tensor]  # layer name -> one number for each expert (E,)

_AXIS = {"load": "share of slots", "weight": "mean weight"}
_MOST_NAMES = 24  # on the axis; more would overlap


def routing_by_label(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[str],
    measure: Measure = "weight",
    batch_size: int = 16,
) -> dict[str, dict[str, Tensor]]:
    """{label: {layer: (E,)}} over all tokens of the texts with that label, in the order in which labels appear.

    Methods that route by task need `with mixture.using(tasks=[number])` around the call.
    Raises ConfigError where texts and labels differ in number, or nothing is routed; TargetError on encoder-decoders.
    """
    check_choice("measure", measure, tuple(_AXIS))
    if not texts or len(texts) != len(labels):
        raise ConfigError(f"{len(texts)} texts and {len(labels)} labels; give a label for each text, and at least one")
    if getattr(mixture.model.config, "is_encoder_decoder", False):
        raise TargetError("an encoder-decoder's question and answer are two texts; routing is shown for one")
    routed_layers(mixture)
    size = 1 if tokenizer.pad_token_id is None else batch_size
    found = {}
    for label in dict.fromkeys(labels):
        own = [text for text, given in zip(texts, labels, strict=True) if given == label]
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        with evaluating(mixture.model):
            found[label] = _measured(mixture, tokenizer, batches, measure)
    return found


def _measured(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Sequence[str]], measure: Measure
) -> dict[str, Tensor]:
    """Sums over the batches, divided by what was summed: slots for the load, tokens for the weight."""
    sums: dict[str, Tensor] = {}
    num_tokens: dict[str, Tensor] = {}
    device = next(mixture.model.parameters()).device
    for texts in batches:
        batch = tokenizer(list(texts), padding=len(texts) > 1, padding_side="right", return_tensors="pt")
        mixture.model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
        for name, layer in routed_layers(mixture).items():
            decision = mixture.state.trace.get(name)
            if decision is not None:  # the others of a feed-forward block follow its first
                gates_TE = expert_gates(decision, layer.experts.num_experts).double().cpu()
                values_TE = gates_TE if measure == "weight" else (gates_TE != 0).double()
                mask_T = decision.mask().double().cpu()
                sums[name] = sums.get(name, 0) + mask_T @ values_TE
                num_tokens[name] = num_tokens.get(name, 0) + mask_T.sum()
    totals = num_tokens if measure == "weight" else {name: sum_E.sum() for name, sum_E in sums.items()}
    return {name: (sum_E / totals[name].clamp(min=1)).float() for name, sum_E in sums.items()}


def routing_heat_map(
    panels: Mapping[str, Panel],
    path: str | Path,
    *,
    measure: Measure = "weight",
    experts: Sequence[str] = (),
    title: str = "",
) -> None:
    """Layers by experts, one panel for each label; white where a layer has fewer experts. Written to path as PNG.

    experts: names for the axis, instead of numbers. Raises ConfigError where there is no matplotlib or nothing to show.
    """
    if not panels or not all(panels.values()):
        raise ConfigError("no routing to draw: give at least one panel with one layer")
    layers = list(dict.fromkeys(layer for panel in panels.values() for layer in panel))
    width = max(len(values) for panel in panels.values() for values in panel.values())
    grids = {name: _padded(panel, layers, width) for name, panel in panels.items()}
    figure = new_figure(max(2.2, 0.28 * width) * len(panels) + 2.5, max(5, 0.1 * len(layers)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    finite = torch.cat([grid[~grid.isnan()] for grid in grids.values()])
    low, high = min(0.0, float(finite.min())), max(1.0, float(finite.max()))
    image: Any = None
    for place, (name, grid) in zip(axes, grids.items(), strict=True):
        image = place.imshow(grid.numpy(), aspect="auto", vmin=low, vmax=high, cmap="viridis")
        place.set(title=name, xlabel="expert")
        place.set_yticks(range(len(layers)), [_short(layer) for layer in layers], fontsize=6)
        if 0 < len(experts) <= _MOST_NAMES:
            place.set_xticks(range(len(experts)), experts, rotation=90, fontsize=7)
    figure.colorbar(image, ax=axes, label=_AXIS[measure])
    figure.suptitle(title)
    write_figure(figure, Path(path))


def _padded(panel: Panel, layers: Sequence[str], width: int) -> Tensor:
    """(layers, width), NaN where a layer has fewer experts or the panel lacks it."""
    rows = torch.full((len(layers), width), float("nan"))
    for row, layer in zip(rows, layers, strict=True):
        if layer in panel:
            row[: len(panel[layer])] = panel[layer]
    return rows


def _short(layer: str) -> str:
    """model.layers.3.mlp.gate_proj -> 3.gate_proj."""
    parts = layer.split(".")
    return ".".join([next((part for part in parts if part.isdigit()), ""), parts[-1]]).strip(".")
