"""The registry of presets and the way to one."""

from collections.abc import Callable
from typing import Any

from molex.config import MixtureConfig
from molex.errors import ConfigError
from molex.registry import Registry

presets: Registry[Callable[[], MixtureConfig]] = Registry("preset")


def preset(name: str, **overrides: Any) -> MixtureConfig:
    """A method's configuration with its paper's defaults, changed where asked.

    Raises ConfigError on an unknown preset or setting; the message lists the known ones.
    """
    config = presets[name]()
    if config.rank == 1 and overrides.get("rank", 1) != 1:
        raise ConfigError(f"{name} has experts of rank 1: its total rank is num_experts, not rank")
    return config.override(overrides)
