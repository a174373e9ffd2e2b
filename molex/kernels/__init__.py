"""Kernel backends: one file each. Importing this package registers them all."""

from molex.kernels import (  # noqa: F401 (registers the backends)
    dense,
    extend,
    grouped,
    megablocks,
    preload,
    reference,
    triton_backend,
    triton_grouped,
    triton_skip,
)
from molex.kernels.base import Backend, Form, backends
from molex.kernels.columns import Columns, columns_of
from molex.kernels.planner import Planner

__all__ = ["Backend", "Columns", "Form", "Planner", "backends", "columns_of"]
