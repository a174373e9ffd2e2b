"""RMM: exact where it has all directions, the best of its kind otherwise, and less wrong once ranks are aligned."""

import pytest
import torch

from molex.errors import ConfigError
from molex.experts import LoRA
from molex.merging import compress
from tests.merging.loras import dense, random_lora


def error(loras: list[LoRA], directions: int, align: bool) -> float:
    kept = compress(loras, directions, align=align)
    lost = sum((dense(kept.restore(i)) - dense(lora)).square().sum() for i, lora in enumerate(loras))
    return float(lost / sum(dense(lora).square().sum() for lora in loras)) ** 0.5


@pytest.mark.parametrize("align", [False, True])
def test_all_directions_restore_every_expert(align: bool) -> None:
    loras = [random_lora(rank, seed, 0.5 - seed) for seed, rank in enumerate((3, 2, 4))]
    assert error(loras, 2, align) < 1e-6, "n - 1 directions"
    assert error(loras, 1, align) > 0.05


def test_one_row_by_hand() -> None:
    loras = [random_lora(3, seed, 1.0) for seed in range(4)]
    kept = compress(loras, 1, align=False)
    X_RN = torch.stack([lora.A[:, 5] for lora in loras], 1)
    mean_R1 = X_RN.mean(1, keepdim=True)
    u, s, v = torch.linalg.svd(X_RN - mean_R1)
    wanted_RN = mean_R1 + s[0] * u[:, :1] @ v[:1]
    got_RN = torch.stack([kept.restore(i).A[:, 5] for i in range(4)], 1)
    torch.testing.assert_close(got_RN, wanted_RN, rtol=1e-9, atol=1e-9)


def test_no_direction_is_the_mean_of_the_factors() -> None:
    loras = [random_lora(3, seed, 1.0) for seed in range(4)]
    restored = compress(loras, 0, align=False).restore(2)
    torch.testing.assert_close(restored.A, sum(lora.A for lora in loras) / 4)
    torch.testing.assert_close(restored.B, sum(lora.B for lora in loras) / 4)


def test_storage_is_the_published_formula() -> None:
    r, n, p = 8, 4, 2
    kept = compress([random_lora(r, seed) for seed in range(n)], p)
    assert kept.storage_ratio == pytest.approx((p * (r + n) + r) / (r * n))


def test_alignment_undoes_a_rotation() -> None:
    lora = random_lora(3)
    loras = []
    for _ in range(4):
        Q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
        loras.append(LoRA(Q @ lora.A, lora.B @ Q.T, lora.scale))
    assert error(loras, 0, align=True) < 1e-6
    assert error(loras, 0, align=False) > 0.1


def test_wrong_numbers() -> None:
    loras = [random_lora(3, seed) for seed in range(4)]
    with pytest.raises(ConfigError, match="from 0 to 3"):
        compress(loras, 4)
    with pytest.raises(ConfigError, match="expert 4 of 4"):
        compress(loras, 1).restore(4)
