"""Settings of every preset that suit the workbench's base: small ranks, a handful of experts, one for each skill where
a method's experts are tasks. The demo and the tests convert with these."""

from typing import Any

from molex.config import MixtureConfig
from molex.presets import preset

OVER_ADAPTERS = ("meteora", "xlora", "arrow")  # presets whose experts are loaded, not trained


def workbench_preset(name: str, num_skills: int) -> MixtureConfig:
    """A preset for a mixture of `num_skills` skills on the workbench's base."""
    own: dict[str, dict[str, Any]] = {
        "lora": {"rank": 16, "alpha": 32},
        "mixlora": {"num_experts": 4, "rank": 8, "alpha": 16},
        "mola": {"rank": 4, "alpha": 8},
        "loramoe": {"num_experts": 4, "alpha": 8},
        "dynmole": {"num_experts": 4, "rank": 8, "alpha": 16},
        "smora": {"num_experts": 32},
        "flylora": {"num_experts": 32},
        "moram": {"num_experts": 16, "targets": ("all",)},
        "lora-mixer": {"num_experts": num_skills, "top_k": min(3, num_skills), "targets": ("all",)},
        "meteora": {"num_experts": num_skills, "top_k": min(2, num_skills)},
        "xlora": {"num_experts": num_skills, "hidden_size": 64},
        "arrow": {"num_experts": num_skills, "top_k": min(3, num_skills)},
        "poly": {"num_tasks": num_skills},
        "mhr": {"num_tasks": num_skills},
        "mos": {"pool_rank": 4, "private_rank": 2},
        "mtlora": {"num_experts": num_skills + 1},
    }
    return preset(name, **{"dropout": 0.0, **own.get(name, {})})


def task_types(name: str) -> int | None:
    """How many task ids a method tells apart, where that is not the number of skills: LoRAMoE's types are two."""
    return 2 if name == "loramoe" else None
