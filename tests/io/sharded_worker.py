"""One rank: shards a mixture with FSDP2, fills it from FOLDER/in, writes it to FOLDER/out. Run by test_sharded.

python sharded_worker.py FOLDER RANK WORLD_SIZE
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from molex.io.checkpoint import load_into
from tests.io.mixtures import of_preset


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    mixture = of_preset("smora", also_train=("norm",))
    with torch.no_grad():
        for parameter in mixture.trainable_parameters():
            parameter.zero_()
    for block in mixture.model.model.layers:
        fully_shard(block)
    fully_shard(mixture.model)
    load_into(mixture, folder / "in")
    mixture.save(folder / "out", is_main_process=rank == 0)
    dist.barrier()  # who leaves while another still gathers from it is aborted by gloo
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
