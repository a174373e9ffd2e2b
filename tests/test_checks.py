"""Settings of the wrong kind and unknown names are sentences that say what is allowed, wherever the setting lives."""

from typing import Any

import pytest

from molex import preset
from molex.checks import near_and_known
from molex.config import MixtureConfig
from molex.errors import ConfigError
from molex.registry import Registry


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("dropout", "0.1", "a finite number"),
        ("alpha", float("nan"), "a finite number or a list"),
        ("alpha", None, "a finite number or a list"),
        ("num_experts", True, "a whole number"),
        ("train_experts", "no", "True or False"),
        ("targets", None, "a list, each a name"),
        ("also_train", (3,), "a list, each a name"),
        ("allocation", 5, "a name or a list, each a whole number or None"),
        ("backend", None, "a name"),
        ("temperature", "hot", "a finite number"),
        ("renormalise", "yes", "True or False"),
        ("gate_init", None, "a finite number or 'kaiming'"),
        ("init", 3, "'kaiming' or 'gaussian'"),
        ("balance_coefficient", "small", "a finite number"),
        ("losses", "load_balance", "a list of losses"),
    ],
)
def test_a_value_of_another_kind_is_refused(setting: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        preset("mola", **{setting: value})
    assert f"{setting}={value!r}" in str(refusal.value)
    assert allowed in str(refusal.value)


def test_values_read_from_json_are_checked_too() -> None:
    plain = preset("mola").to_dict()
    with pytest.raises(ConfigError, match=r"dropout='0\.1'"):
        MixtureConfig.from_dict({**plain, "dropout": "0.1"})
    with pytest.raises(ConfigError, match=r"jitter='0\.1'"):
        MixtureConfig.from_dict({**plain, "router": {"kind": "topk", "jitter": "0.1"}})


def test_lists_and_whole_numbers_stand_for_tuples_and_floats() -> None:
    config = preset("mola", targets="q_proj", allocation=[1, 2], alpha=[1, 2], temperature=2)
    assert config.targets == ("q_proj",)
    assert config.allocation == (1, 2)


def test_an_unknown_name_gets_the_near_one_or_all() -> None:
    assert near_and_known("topk", ["top_k", "rank"]) == "; did you mean 'top_k'? Known: top_k, rank"
    assert near_and_known("zzz", ["top_k", "rank"]) == "; known: top_k, rank"


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_a_name_that_is_no_text_is_unknown(name: Any) -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("a")(1)
    with pytest.raises(ConfigError, match=r"unknown thing .*; .*nown: a"):
        registry[name]
