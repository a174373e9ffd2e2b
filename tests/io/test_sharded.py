"""A mixture sharded over two processes is filled from one folder, and written whole to another."""

from pathlib import Path

from tests.distributed.launch import run_ranks
from tests.io.mixtures import file_bytes, of_preset


def test_a_sharded_mixture_is_filled_and_saved_whole(tmp_path: Path) -> None:
    of_preset("smora", also_train=("norm",)).save(tmp_path / "in")
    run_ranks(Path(__file__).parent / "sharded_worker.py", tmp_path, 2, [], timeout=120)
    assert file_bytes(tmp_path / "in") == file_bytes(tmp_path / "out")
