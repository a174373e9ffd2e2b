"""DDP, FSDP2, ZeRO-2 and ZeRO-3 train every kind of mixture to what one process gets from the same global batch."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import molex
from tests.distributed.cases import CASES, DTYPES, LEARNING_RATE, build, logits, train
from tests.distributed.launch import HERE, run_ranks
from tests.models import tiny

WORLD_SIZE = 2
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
GROUPS = (("ddp", "fsdp"), ("zero2", "zero3"))  # one start of the processes for each

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install -c constraints.txt -e '.[dev,scale]'",
)
STRATEGIES = [pytest.param(name, marks=needs_deepspeed if name.startswith("zero") else ()) for name in DTYPES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "_Runs":
    return _Runs(tmp_path_factory.mktemp("strategies"))


class _Runs:
    """Results by strategy; the processes of a group start when one of its strategies is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def of(self, strategy: str) -> Path:
        group = next(group for group in GROUPS if strategy in group)
        folder = self.root / "-".join(group)
        if not folder.exists():
            folder.mkdir()
            run_ranks(HERE / "worker.py", folder, WORLD_SIZE, list(group), timeout=300)
        return folder / strategy


@pytest.fixture(scope="module")
def alone() -> "_Alone":
    return _Alone()


class _Alone:
    """What one process gets, trained once for each case and precision."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.dtype], tuple[list[tuple[Tensor, Tensor]], molex.Mixture]] = {}

    def of(self, case: str, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], molex.Mixture]:
        if (case, dtype) not in self.known:
            model, mixture = build(case, dtype)
            optimizer = torch.optim.SGD(mixture.trainable_parameters(), lr=LEARNING_RATE)

            def update() -> None:
                optimizer.step()
                optimizer.zero_grad()

            self.known[case, dtype] = train(model, mixture, Tensor.backward, update), mixture
        return self.known[case, dtype]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_train_as_one_process_does(strategy: str, case: str, folders: _Runs, alone: _Alone) -> None:
    dtype = DTYPES[strategy]
    losses, mixture = alone.of(case, dtype)
    folder = folders.of(strategy) / case
    written = json.loads((folder / "run.json").read_text())
    assert written["parameters"] == mixture.num_parameters()
    expected = torch.tensor([[float(task), float(aux)] for task, aux in losses], dtype=torch.float64)
    got = torch.tensor(written["losses"], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    saved = load_file(folder / "molex.safetensors")
    assert saved.keys() == mixture.state_dict().keys()
    for name, tensor in mixture.state_dict().items():
        torch.testing.assert_close(
            saved[name], tensor, rtol=0, atol=TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}"
        )

    if dtype == torch.float32:
        loaded = molex.load(tiny("llama"), folder)
        # every factor may be off by TOLERANCE, and logits sum over them: where modules are sharded, feed-forward
        # blocks run layer by layer and round elsewhere
        torch.testing.assert_close(logits(loaded), logits(mixture), rtol=1e-4, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
def test_training_moves_what_is_compared(case: str, alone: _Alone) -> None:
    start = build(case, torch.float64)[1].state_dict()
    losses, mixture = alone.of(case, torch.float64)
    trained = {name for name, p in mixture.model.named_parameters() if p.requires_grad}
    for name, tensor in mixture.state_dict().items():
        moved = float((tensor - start[name]).abs().max())
        if name in trained:
            assert moved > 1e-9, f"{name} never moved: its gradient is not tested here"
    assert losses[0][0] != losses[-1][0]
