"""The shipped base: what its record and its code say it is, and blind to the skills."""

import json

import pytest
import torch
from safetensors import safe_open

from molex.workbench import dataset, exact_match_by_skill, load_base, load_tokenizer, skills, transformations
from molex.workbench.model import base_config
from molex.workbench.pretrain import Pretraining
from molex.workbench.tokenizer import ASSETS


@pytest.fixture(scope="module")
def base():
    return load_base()


def test_shipped_config_is_the_one_in_the_code(base):
    shipped, coded = base.config.to_dict(), base_config().to_dict()
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in shipped.items() if k not in ignored} == {
        k: v for k, v in coded.items() if k not in ignored
    }


def test_weights_are_bfloat16_small_and_finite():
    (path,) = ASSETS.glob("*.safetensors")
    assert path.stat().st_size < 8 * 2**20
    with safe_open(path, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_the_asked_dtype(dtype):
    assert {parameter.dtype for parameter in load_base(dtype).parameters()} == {dtype}


def test_record_is_of_the_recipe_in_the_code(base):
    record = json.loads((ASSETS / "pretraining.json").read_text())
    recipe = Pretraining()
    assert {name: record[name] for name in vars(recipe)} == vars(recipe)
    assert record["parameters"] == base.num_parameters()
    assert record["exact_match"].keys() == transformations().keys()


def test_base_does_not_know_the_skills(base):
    scores = exact_match_by_skill(base, load_tokenizer(), dataset(list(skills()), "test", 30 * len(skills())))
    assert max(scores.values()) < 0.2, scores


def test_base_knows_its_transformations(base):
    names = list(transformations())
    scores = exact_match_by_skill(base, load_tokenizer(), dataset(names, "test", 20 * len(names), "text"))
    assert sum(scores.values()) / len(scores) > 0.9, scores
