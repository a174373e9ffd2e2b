"""Recipes: what is read, what is refused with the nearest name, and that the resolved one reads back the same."""

from pathlib import Path

import pytest
import yaml

from molex.errors import ConfigError
from molex.merging.recipe import MergeRecipe, make_recipe, read_recipe

ROOT = Path(__file__).parents[2]
GOOD = {"base": "b", "adapters": {"x": "px", "y": {"path": "py"}}, "rule": "ties"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("merge_*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_read(path: Path) -> None:
    recipe = read_recipe(path, {})
    assert recipe.ready_rule() is not None
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe_with_all_settings(recipe)


def recipe_with_all_settings(recipe: MergeRecipe) -> MergeRecipe:
    """The resolved file also says the rule's defaults."""
    settings = yaml.safe_load(recipe.to_yaml()).get("parameters", {})
    return MergeRecipe(**{**vars(recipe), "parameters": settings, "rule": recipe.rule or "linear"})


def test_flags_win(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(GOOD))
    recipe = read_recipe(tmp_path / "r.yaml", {"rule": "svd", "rank": 4})
    assert (recipe.rule, recipe.rank) == ("svd", 4)
    assert recipe.adapters == {"x": "px", "y": "py"}
    assert recipe.weights is None


def test_settings_of_a_file_go_with_its_rule(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**GOOD, "parameters": {"density": 0.2, "majority": "frequency"}}))
    changed = read_recipe(tmp_path / "r.yaml", {"parameters": {"density": 0.7}})
    assert changed.parameters == {"density": 0.7, "majority": "frequency"}
    assert read_recipe(tmp_path / "r.yaml", {"rule": "svd"}).parameters == {}


def test_weights_of_every_form_read_back() -> None:
    weights = {"x": [0.1, 0.9], "y": [{"filter": "mlp.*", "value": [1.0, 0.0]}, {"value": 0.5}]}
    given = {name: {"path": name, "weight": weight} for name, weight in weights.items()}
    recipe = make_recipe({**GOOD, "adapters": given})
    assert recipe.weights == weights
    assert make_recipe(yaml.safe_load(recipe.to_yaml())).weights == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptors": {}}, "did you mean 'adapters'"),
        ({"rule": "tie"}, "did you mean 'ties'"),
        ({"parameters": {"densty": 1}}, "did you mean 'density'"),
        ({"adapters": {"x": {"path": "p", "wieght": 1}}}, "did you mean 'weight'"),
        ({"adapters": {"x": {"weight": 1}}}, "give a path"),
        ({"adapters": {"x": {"path": "p", "weight": 1}, "y": "p"}}, "y have no weight"),
        ({"adapters": {"x": {"path": "p", "weight": "high"}}}, "weight of x is 'high'"),
        ({"adapters": ["p"]}, "give keys and values"),
        ({"adapters": {}}, "nothing to merge"),
        ({"mixture": "m"}, "not both"),
        ({"base": None}, "say what is merged"),
        ({"as": "moe"}, "choose from 'dense', 'lora'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"shard_size": "big"}, "shard_size='big'"),
        ({"rank": 2, "energy": 0.5}, "give one"),
        ({"rule": None, "parameters": {"density": 1}}, "name the rule"),
    ],
)
def test_what_is_wrong(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe({**GOOD, **changes})


@pytest.mark.parametrize(
    ("text", "message"), [("- a", "holds a list"), ("a: [", "is no YAML"), (None, "cannot be read")]
)
def test_files_that_are_none(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path, {})
