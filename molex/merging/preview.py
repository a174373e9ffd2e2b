"""What a merge would do, from headers and configurations alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molex.errors import CheckpointError, TargetError
from molex.io.hub import local_folder
from molex.io.inspect import LayerDescription, describe
from molex.io.peft import CONFIG_FILE, TENSOR_FILE
from molex.merging.checkpoint import open_base, plan
from molex.merging.recipe import MergeRecipe
from molex.merging.weights import Depths, by_adapter, check_filters, weights_in


@dataclass(frozen=True, kw_only=True)
class Preview:
    """layers: a row for each linear that changes. files: a row for each file of weights, of a dense merge."""

    layers: list[dict[str, Any]]
    files: list[dict[str, Any]]


def preview(recipe: MergeRecipe) -> Preview:
    """Raises as the merge of adapters itself would, as far as headers tell."""
    base = open_base(recipe.base)
    sources = {name: _layers(path) for name, path in recipe.adapters.items()}
    sizes: dict[str, tuple[int, int]] = {}
    for name, layers in sources.items():
        for layer, told in layers.items():
            if sizes.setdefault(layer, (told.in_features, told.out_features)) != (told.in_features, told.out_features):
                raise TargetError(f"{layer} has another size in {name} than in other adapters: for different bases")
    base.check(sizes, {})
    rule = recipe.ready_rule()
    assert rule is not None
    given = None if recipe.weights is None else by_adapter(recipe.weights, list(sources))
    check_filters(given or (), list(sizes))
    depths = Depths([*(name for name, _ in base.model.named_modules()), *sizes])
    rows = []
    for layer, (num_in, num_out) in sizes.items():
        ranks = [layers[layer].rank if layer in layers else 0 for layers in sources.values()]
        weights = rule.default_weights(len(sources)) if given is None else weights_in(layer, given, depths)
        rounded = [round(weight, 4) for weight in weights]
        rows.append({"linear": layer, "in": num_in, "out": num_out, "ranks": ranks, "weights": rounded})
    if recipe.kind == "lora":
        return Preview(layers=rows, files=[])
    files = [
        {"file": name, "tensors": len(shard), "bytes": sum(entry.header.num_bytes for entry in shard)}
        for name, shard in plan(base, recipe.torch_dtype(), recipe.shard_size).items()
    ]
    return Preview(layers=rows, files=files)


def _layers(path: str) -> Mapping[str, LayerDescription]:
    folder = local_folder(path, [CONFIG_FILE, TENSOR_FILE], "give a folder that PEFT's save_pretrained wrote")
    told = describe(Path(folder))
    if told.kind != "peft":
        raise CheckpointError(f"{path} is a mixture: merge it by itself, `molex merge {path} --out FOLDER`")
    return {layer.name: layer for layer in told.layers}
