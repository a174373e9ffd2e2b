"""One rank: trains every case under the named strategies, writes losses and the mixtures. Run by test_strategies.

python worker.py FOLDER RANK WORLD_SIZE STRATEGY...
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import molex
from tests.distributed.cases import CASES, DTYPES, LEARNING_RATE, ROWS, build, train

Loop = tuple[Callable[..., Any], Callable[[Tensor], None], Callable[[], None]]  # forward, backward, update


def main(folder: Path, rank: int, world_size: int, strategies: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    for strategy in strategies:
        for case in CASES:
            train_case(strategy, case, folder / strategy / case, rank, world_size)
    dist.barrier()  # who leaves while another still gathers from it is aborted by gloo
    dist.destroy_process_group()


def train_case(strategy: str, case: str, folder: Path, rank: int, world_size: int) -> None:
    """Trains one case from the start and writes what it led to."""
    model, mixture = build(case, DTYPES[strategy])
    forward, backward, update = STRATEGIES[strategy](model, mixture)
    losses = train(forward, mixture, backward, update, rank, world_size)
    for task_loss, _ in losses:
        dist.all_reduce(task_loss)
        task_loss /= world_size
    mixture.save(folder, is_main_process=rank == 0)
    if rank == 0:
        numbers = [[float(task), float(aux)] for task, aux in losses]
        (folder / "run.json").write_text(json.dumps({"losses": numbers, "parameters": mixture.num_parameters()}))


def ddp(model: nn.Module, mixture: molex.Mixture) -> Loop:
    """Replicas; gradients are averaged."""
    return DistributedDataParallel(model), Tensor.backward, _sgd(mixture)


def fsdp(model: nn.Module, mixture: molex.Mixture) -> Loop:
    """FSDP2, block by block."""
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model, Tensor.backward, _sgd(mixture)


def zero2(model: nn.Module, mixture: molex.Mixture) -> Loop:
    """Gradients and optimizer states partitioned."""
    return _deepspeed(model, mixture, {"stage": 2})


def zero3(model: nn.Module, mixture: molex.Mixture) -> Loop:
    """Parameters too, however small, and none kept for later: by default a tiny model would stay whole."""
    keep = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    return _deepspeed(model, mixture, {"stage": 3, **{f"stage3_{name}": 0 for name in keep}})


def _sgd(mixture: molex.Mixture) -> Callable[[], None]:
    optimizer = torch.optim.SGD(mixture.trainable_parameters(), lr=LEARNING_RATE)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def _deepspeed(model: nn.Module, mixture: molex.Mixture, zero: dict[str, Any]) -> Loop:
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # else it compiles a shared-memory transport first, for minutes
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # by default DeepSpeed clips at 1
    }
    optimizer = torch.optim.SGD(mixture.trainable_parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if zero["stage"] == 3:
        assert all(parameter.numel() == 0 for parameter in model.parameters()), "ZeRO-3 partitioned nothing"
    return engine, engine.backward, engine.step


STRATEGIES: dict[str, Callable[[nn.Module, molex.Mixture], Loop]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "zero2": zero2,
    "zero3": zero3,
}
if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
