"""Runs a script of transformers' Trainer under torchrun on CPUs, DeepSpeed included.

python on_gloo.py SCRIPT ARGUMENTS...

accelerate names no backend where it finds no accelerator, and then believes each process to be alone; DeepSpeed would
first compile a transport of its own. On machines with GPUs neither is needed.
"""

import importlib.util
import runpy
import sys
from typing import Any

import torch
from accelerate.state import PartialState

_prepare_backend = PartialState._prepare_backend


def _prepare_gloo(self: PartialState, *args: Any, **kwargs: Any) -> Any:
    backend, distributed_type = _prepare_backend(self, *args, **kwargs)
    return backend or "gloo", distributed_type


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState._prepare_backend = _prepare_gloo  # type: ignore[method-assign]
    if importlib.util.find_spec("deepspeed") is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__ = {}
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
