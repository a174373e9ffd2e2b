"""Every rule against its formula over dense float64 updates, and against what must not change it."""

import dataclasses

import pytest
import torch

from molex.errors import ConfigError
from molex.experts import LoRA
from molex.merging import make_rule, rules
from molex.merging.base import generator_of
from molex.merging.cat import CatRule
from molex.merging.core import Core, distance, norm, truncate
from tests.merging.loras import IN, OUT, core_bases, dense, random_lora, some, ties_of, trimmed

WEIGHTS = [0.7, -0.4, 1.3]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
every_rule = pytest.mark.parametrize("name", rules)

# one row for each rule: settings that show it
SETTINGS = {
    "linear": {},
    "cat": {},
    "svd": {"rank": 2},
    "ties": {"density": 0.4},
    "dare": {"density": 0.6, "seed": 3},
    "dare_ties": {"density": 0.6, "seed": 3},
    "magnitude": {"density": 0.4},
    "knots": {"density": 0.4},
    "iso_c": {},
    "lego": {"rank": 2},
}


def rule_of(name: str):
    assert name in SETTINGS, f"merge rule {name!r} has no row in tests/merging/test_rules.py"
    return make_rule(name, SETTINGS[name])


def total(loras, weights):
    return sum(w * dense(lora) for w, lora in zip(weights, loras, strict=True))


@pytest.mark.parametrize("name", ["linear", "cat"])
def test_exact_rules_are_the_weighted_sum(name: str) -> None:
    loras = some((2, 3, 1))
    merged = make_rule(name).merge(loras, WEIGHTS)
    torch.testing.assert_close(dense(merged), total(loras, WEIGHTS), **EXACT)
    assert merged.scale == 1
    mean = make_rule(name).merge(loras, make_rule(name).default_weights(3))
    torch.testing.assert_close(dense(mean), sum(map(dense, loras)) / 3, **EXACT)
    assert CatRule().merge(loras, WEIGHTS).A.shape[0] == 6


def test_linear_has_the_sums_own_rank() -> None:
    lora = random_lora(3)
    merged = make_rule("linear").merge([lora, lora, random_lora(2, 1)], [1.0, 1.0, 1.0])
    assert merged.A.shape[0] == 5


def test_svd_is_the_nearest_of_its_rank() -> None:
    loras = some((3, 3, 2))
    u, s, v = torch.linalg.svd(total(loras, WEIGHTS))
    merged = make_rule("svd", {"rank": 2}).merge(loras, WEIGHTS)
    torch.testing.assert_close(dense(merged), u[:, :2] * s[:2] @ v[:2], **EXACT)
    by_energy = make_rule("svd", {"energy": 0.9}).merge(loras, WEIGHTS)
    shares = s.square().cumsum(0) / s.square().sum()
    assert by_energy.A.shape[0] == 1 + int((shares < 0.9).sum())
    assert make_rule("svd").merge(loras, WEIGHTS).A.shape[0] == 3


@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_truncation_reports_its_error(energy: float) -> None:
    lora = random_lora(5)
    cut, error = truncate(lora, energy=energy)
    assert error == pytest.approx(float((dense(cut) - dense(lora)).norm() / dense(lora).norm()), abs=1e-7)
    assert error**2 <= 1 - energy + 1e-9
    worse = truncate(lora, rank=cut.A.shape[0] - 1)[1] if cut.A.shape[0] > 1 else 1.0
    assert worse**2 > 1 - energy
    assert norm(lora) == pytest.approx(float(dense(lora).norm()))
    assert distance(lora, cut) == pytest.approx(float((dense(cut) - dense(lora)).norm()), abs=1e-7)


def in_core(loras, combine):
    U, V = core_bases(loras)
    return U @ combine([U.T @ dense(lora) @ V for lora in loras]) @ V.T


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_in_core_space(majority: str) -> None:
    loras = some((3, 2, 2))
    wanted = in_core(
        loras, lambda M: ties_of([trimmed(m, int(0.4 * m.numel())) for m in M], WEIGHTS, majority == "frequency")
    )
    merged = make_rule("ties", {"density": 0.4, "majority": majority}).merge(loras, WEIGHTS)
    torch.testing.assert_close(dense(merged), wanted, **EXACT)


def test_magnitude_in_core_space() -> None:
    loras = some((3, 2, 2))
    wanted = in_core(
        loras, lambda M: sum(w * trimmed(m, int(0.3 * m.numel())) for w, m in zip(WEIGHTS, M, strict=True))
    )
    torch.testing.assert_close(dense(make_rule("magnitude", {"density": 0.3}).merge(loras, WEIGHTS)), wanted, **EXACT)


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_dare_in_core_space(name: str) -> None:
    loras = some((3, 2, 2))
    shape = Core.of(loras).cores.shape
    masks = torch.bernoulli(torch.full(shape, 0.6), generator=generator_of(3, "a")).double()

    def combine(M):
        dropped = [mask * m / 0.6 for mask, m in zip(masks, M, strict=True)]
        plain = sum(w * m for w, m in zip(WEIGHTS, dropped, strict=True))
        return plain if name == "dare" else ties_of(dropped, WEIGHTS)

    torch.testing.assert_close(dense(rule_of(name).merge(loras, WEIGHTS, "a")), in_core(loras, combine), **EXACT)


def test_dare_is_unbiased() -> None:
    loras = some((2, 2, 2))
    rule = make_rule("dare", {"density": 0.5})
    mean = sum(dense(rule.merge(loras, WEIGHTS, str(i))) for i in range(400)) / 400
    wanted = total(loras, WEIGHTS)
    assert (mean - wanted).norm() / wanted.norm() < 0.15


def whole_model(merging):
    """Two linears' updates side by side, by the dense formula of KnOTS."""
    layers = {"a": some((2, 2, 2)), "b": [random_lora(2, 10 + i, 1.0) for i in range(3)]}
    aligned = {}
    for name, loras in layers.items():
        u, s, v = torch.linalg.svd(torch.cat([dense(lora) for lora in loras], 1), full_matrices=False)
        kept = s > 1e-9
        aligned[name] = u[:, kept], [s[kept, None] * part for part in v[kept].split(IN, dim=1)]
    return layers, {name: u @ merging(name, aligned) for name, (u, _) in aligned.items()}


def test_knots_sum_is_the_sum() -> None:
    loras = some()
    merged = make_rule("knots", {"merging": "sum"}).merge(loras, WEIGHTS)
    torch.testing.assert_close(dense(merged), total(loras, WEIGHTS), **EXACT)


def test_knots_ties_counts_over_the_whole_model() -> None:
    def merging(name, aligned):
        kept = []
        for i in range(3):
            everything = torch.cat([parts[i].flatten() for _, parts in aligned.values()]).abs().sort(descending=True)
            limit = everything.values[int(0.4 * len(everything.values))]  # floor(d K) + 1 stay
            part = aligned[name][1][i]
            kept.append(part * (part.abs() >= limit * (1 - 1e-12)))
        return ties_of(kept, WEIGHTS)

    layers, wanted = whole_model(merging)
    merger = rule_of("knots").over(layers)
    for name, loras in layers.items():
        torch.testing.assert_close(dense(merger(loras, WEIGHTS, name)), wanted[name], **EXACT)
    by_tensor = make_rule("knots", {"density": 0.4, "scope": "tensor"}).over(layers)
    assert distance(by_tensor(layers["a"], WEIGHTS, "a"), merger(layers["a"], WEIGHTS, "a")) > 1e-3


def test_ties_counts_over_the_whole_model_where_asked() -> None:
    layers = {"a": some((2, 2, 2)), "b": [random_lora(2, 10 + i, 0.1) for i in range(3)]}
    cores = {}
    for name, loras in layers.items():
        U, V = core_bases(loras)
        cores[name] = U, V, [U.T @ dense(lora) @ V for lora in loras]
    merger = make_rule("ties", {"density": 0.4, "scope": "model"}).over(layers)
    for name, loras in layers.items():
        kept = []
        for i in range(3):
            everything = torch.cat([M[i].flatten() for _, _, M in cores.values()]).abs().sort(descending=True).values
            kept.append(cores[name][2][i] * (cores[name][2][i].abs() >= everything[int(0.4 * len(everything)) - 1]))
        U, V, _ = cores[name]
        got = dense(merger(loras, WEIGHTS, name))
        torch.testing.assert_close(got, U @ ties_of(kept, WEIGHTS) @ V.T, **EXACT)


def test_iso_c_has_equal_singular_values() -> None:
    loras = some((2, 3, 1))
    u, s, v = torch.linalg.svd(total(loras, WEIGHTS), full_matrices=False)
    rank = 6
    wanted = s[:rank].mean() * u[:, :rank] @ v[:rank]
    torch.testing.assert_close(dense(make_rule("iso_c").merge(loras, WEIGHTS)), wanted, **EXACT)
    twice = make_rule("iso_c").merge([loras[0], loras[0]], [0.5, 0.5])
    assert twice.A.shape[0] == 2, "directions beyond the range"
    alone = make_rule("iso_c").merge([loras[0]], [1.0])
    cancelled = make_rule("iso_c").merge([loras[0], loras[1], loras[1]], [1.0, 0.5, -0.5])
    torch.testing.assert_close(dense(cancelled), dense(alone), rtol=1e-7, atol=1e-7)


def test_lego_with_a_cluster_for_each_unit_is_the_sum() -> None:
    loras = some((2, 3, 1))
    plain = {"reweight_units": False, "reweight_output": False}
    merged = make_rule("lego", {"rank": 6, **plain}).merge(loras, WEIGHTS)
    torch.testing.assert_close(dense(merged), total(loras, WEIGHTS), **EXACT)
    assert make_rule("lego", {"rank": 99}).merge(loras, WEIGHTS).A.shape[0] == 6


def test_lego_averages_and_reweights_clusters() -> None:
    """Two clear clusters: units near e_0 ⊕ e_0 and near e_1 ⊕ e_1, by hand."""
    first, second = torch.zeros(2, IN, dtype=torch.float64), torch.zeros(2, IN, dtype=torch.float64)
    first[0, 0], first[1, 1], second[0, 0], second[1, 1] = 4.0, 3.0, 5.0, 2.0
    B = torch.zeros(OUT, 2, dtype=torch.float64)
    B[0, 0] = B[1, 1] = 1.0
    merged = make_rule("lego", {"rank": 2}).merge([LoRA(first, B, 1.0), LoRA(second, B, 1.0)], [1.0, 1.0])
    wanted = torch.zeros(OUT, IN, dtype=torch.float64)
    wanted[0, 0], wanted[1, 1] = 4.5, 2.5  # mean ‖u‖_∞ over ‖μ‖_∞ is 1 here, r = k = 2
    torch.testing.assert_close(dense(merged), wanted, **EXACT)
    one = make_rule("lego", {"rank": 1, "reweight_units": False}).merge([LoRA(first, B, 1.0)], [1.0])
    mean = torch.cat([first.mean(0), B.mean(1)])
    torch.testing.assert_close(dense(one), 2**0.5 * torch.outer(mean[IN:], mean[:IN]), **EXACT)
    both = make_rule("lego", {"rank": 1}).merge([LoRA(first, B, 1.0)], [1.0])
    longer = (4.0 + 3.0) / 2 / 2.0  # ‖μ‖_∞ is 4 / 2
    torch.testing.assert_close(dense(both), longer**2 * dense(one), **EXACT)


@pytest.mark.parametrize("name", sorted(set(rules) - {"lego"}))
def test_rotating_ranks_changes_nothing(name: str) -> None:
    """A -> Q A, B -> B Qᵀ is the same expert. LEGO takes single ranks apart, so it may only be permuted."""
    loras = some((3, 2, 2))
    rotated = []
    for lora in loras:
        Q, _ = torch.linalg.qr(torch.randn(len(lora.A), len(lora.A), dtype=torch.float64))
        rotated.append(LoRA(Q @ lora.A, lora.B @ Q.T, lora.scale))
    before, after = (rule_of(name).merge(given, WEIGHTS, "a") for given in (loras, rotated))
    torch.testing.assert_close(dense(after), dense(before), rtol=1e-7, atol=1e-7)


@every_rule
def test_permuting_ranks_changes_nothing(name: str) -> None:
    loras = some((4, 3, 2))
    permuted = []
    for lora in loras:
        order = torch.randperm(len(lora.A))
        permuted.append(LoRA(lora.A[order], lora.B[:, order], lora.scale))
    before, after = (rule_of(name).merge(given, WEIGHTS, "a") for given in (loras, permuted))
    torch.testing.assert_close(dense(after), dense(before), rtol=1e-7, atol=1e-7)


@every_rule
def test_zero_experts_and_one_adapter(name: str) -> None:
    rule, lora = rule_of(name), random_lora(3)
    nothing = LoRA(torch.zeros(3, IN), torch.randn(OUT, 3), 1.0)
    zero = rule.merge([nothing, nothing], [1.0, 1.0], "a")
    assert dense(zero).norm() == 0
    assert (zero.A.shape[1], zero.B.shape[0]) == (IN, OUT)
    alone, beside = rule.merge([lora], [1.0], "a"), rule.merge([lora, nothing], [1.0, 1.0], "a")
    assert dense(alone).isfinite().all()
    if name not in ("dare", "dare_ties"):  # a zero expert draws a mask of its own
        torch.testing.assert_close(dense(beside), dense(alone), **EXACT)
    if name in ("linear", "cat"):
        torch.testing.assert_close(dense(alone), dense(lora), **EXACT)


@every_rule
def test_seeds_layers_and_dtypes(name: str) -> None:
    loras = [LoRA(lora.A.float(), lora.B.bfloat16(), lora.scale) for lora in some((3, 2, 2))]
    rule = rule_of(name)
    first, again = rule.merge(loras, WEIGHTS, "a"), rule.merge(loras, WEIGHTS, "a")
    assert first.A.dtype == first.B.dtype == torch.float32
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    if name in ("dare", "dare_ties"):
        assert distance(rule.merge(loras, WEIGHTS, "b"), first) > 0
        assert distance(dataclasses.replace(rule, seed=4).merge(loras, WEIGHTS, "a"), first) > 0


def test_no_dense_update_is_formed() -> None:
    """(O, D) would be 4e10 numbers here."""
    wide = 200_000
    for name in sorted(set(rules)):
        loras = [LoRA(torch.randn(2, wide), torch.randn(wide, 2), 1.0) for _ in range(2)]
        assert rule_of(name).merge(loras, [1.0, 1.0], "a").A.shape[1] == wide


@pytest.mark.parametrize(
    ("rule", "parameters", "message"),
    [
        ("tie", {}, "did you mean 'ties'"),
        ("ties", {"densty": 0.5}, "did you mean 'density'"),
        ("cat", {"density": 0.5}, "it has no settings"),
        ("ties", {"density": 1.5}, "density=1.5"),
        ("ties", {"density": "half"}, "density='half'"),
        ("ties", {"scope": "layer"}, "choose from 'tensor', 'model'"),
        ("ties", {"space": "dense"}, "choose from 'core', 'factors'"),
        ("dare", {"density": 0.0}, "density=0.0"),
        ("knots", {"merging": "mean"}, "choose from 'sum'"),
        ("svd", {"rank": 0}, "rank=0"),
        ("svd", {"rank": 2, "energy": 0.5}, "give one"),
        ("lego", {"rank": 0}, "rank=0"),
    ],
)
def test_wrong_settings(rule: str, parameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_rule(rule, parameters)


def test_factors_need_one_rank() -> None:
    with pytest.raises(ConfigError, match=r"one rank, these have \[1, 2, 3\]"):
        make_rule("ties", {"space": "factors"}).merge(some(), WEIGHTS)
