"""Routers: one file each. Importing this package registers them all; a new router is one more name here."""

from molex.routers import (  # noqa: F401 (registers the routers)
    arrow,
    constant,
    dynamic,
    implicit,
    polytropon,
    scalings,
    self_activated,
    sigmoid,
    soft,
    staged,
    static,
    task,
    topk,
)
from molex.routers.base import BalancedRouter, GatedRouter, Router, RouterConfig, routers

__all__ = ["BalancedRouter", "GatedRouter", "Router", "RouterConfig", "routers"]
