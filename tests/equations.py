"""The papers' equations, one token at a time, in plain loops: what routers, experts and losses are compared with.

Nothing here calls molex's routing, kernels or banks: it reads parameters off them and multiplies by hand. Routers are
given in evaluation mode. Gates are (E,): each expert's weight for this token, zero where it was not chosen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Token(NamedTuple):
    """One token as a router may see it."""

    x: Tensor  # (D,)
    z: Tensor  # (E,): A x, for routers that route on it
    task: int


def softmax(logits: Tensor) -> Tensor:
    powers = [(logit - logits.max().detach()).exp() for logit in logits]
    return torch.stack([power / sum(powers) for power in powers])


def largest(scores: Tensor, count: int) -> list[int]:
    """The indices of the `count` largest scores, largest first."""
    return sorted(range(len(scores)), key=scores.tolist().__getitem__, reverse=True)[:count]


def scatter(size: int, values: dict[int, Tensor], like: Tensor) -> Tensor:
    return torch.stack([values.get(i, like.new_zeros(())) for i in range(size)])


# routers: (router, token) -> gates (E,)


def all_at_one(router: Any, token: Token) -> Tensor:
    return token.x.new_ones(router.num_experts)


def learned_constants(router: Any, token: Token) -> Tensor:
    """LoRA Soups: w, whatever the token."""
    return router.weights


def soft(router: Any, token: Token) -> Tensor:
    """LoRAMoE, HydraLoRA: w = softmax(W x)."""
    return softmax(router.gate.weight @ token.x)


def top_k_renormalised(router: Any, token: Token) -> Tensor:
    """MixLoRA, MoLA, MeteoRA: p = softmax(W x / τ), the k largest, divided by their sum."""
    p = softmax(router.gate.weight @ token.x / router.config.temperature)
    chosen = largest(p, router.config.top_k)
    return scatter(len(p), {i: p[i] / sum(p[j] for j in chosen) for i in chosen}, p)


def tsallis(p: Tensor, q: float, eps: float = 1e-5) -> Tensor:
    """Tsallis entropy over its maximum."""
    return (1 - sum((p_i + eps) ** q for p_i in p)) / (q - 1) / ((1 - len(p) ** (1 - q)) / (q - 1))


def dynmole_kept(p: Tensor, config: Any) -> list[int]:
    """DynMoLE: all experts where uncertain, else those whose running sum stays within top_p, at least keep_top_k."""
    if float(tsallis(p.detach(), config.entropy_index)) > config.entropy_threshold:
        return list(range(len(p)))
    kept, running = [], 0.0
    for rank, i in enumerate(largest(p, len(p))):
        running += p[i].item()
        if running <= config.top_p or rank < config.keep_top_k:
            kept.append(i)
    return kept


def dynmole(router: Any, token: Token) -> Tensor:
    p = softmax(router.gate.weight @ token.x)
    return scatter(len(p), {i: p[i] for i in dynmole_kept(p, router.config)}, p)


def smora(router: Any, token: Token) -> Tensor:
    """q = sigmoid(W x) + b, the k largest, divided by their sum."""
    scores = router.gate.weight @ token.x
    q = torch.stack([1 / (1 + (-score).exp()) for score in scores for _ in range(router.config.rank_partition)])
    q = q + router.bias
    chosen = largest(q, router.config.top_k)
    return scatter(len(q), {i: q[i] / sum(q[j] for j in chosen) for i in chosen}, q)


def flylora(router: Any, token: Token) -> Tensor:
    """Weight 1 on the k largest |A x + d|."""
    chosen = largest((token.z + router.bias).abs(), router.config.top_k)
    return scatter(len(token.z), {i: token.x.new_ones(()) for i in chosen}, token.x)


def moram(router: Any, token: Token) -> Tensor:
    """n = z / ‖z‖; softmax of the k largest n / τ; below the threshold nothing (evaluation)."""
    n = token.z / (sum(z_i**2 for z_i in token.z) ** 0.5 + 1e-8)
    chosen = largest(n, router.config.top_k)
    w = softmax(torch.stack([n[i] for i in chosen]) / router.config.temperature)
    loud = {i: w[slot] for slot, i in enumerate(chosen) if n[i].item() >= router.config.threshold}
    return scatter(len(n), loud, n)


def arrow(router: Any, token: Token) -> Tensor:
    """Softmax over the k largest |v_e · x|."""
    scores = torch.stack([(v @ token.x).abs() for v in router.prototypes])
    chosen = largest(scores, router.config.top_k)
    w = softmax(torch.stack([scores[i] for i in chosen]) / router.config.temperature)
    return scatter(len(scores), {i: w[slot] for slot, i in enumerate(chosen)}, scores)


def task_and_shared(router: Any, token: Token) -> Tensor:
    """MTLoRA: expert 0 and the task's own, both at 1."""
    one = token.x.new_ones(())
    return scatter(router.num_experts, {0: one, 1 + token.task: one}, token.x)


def top_k_of_soft(router: Any, token: Token) -> Tensor:
    """LoRA-Mixer in evaluation: the top k of softmax(W x), renormalised."""
    p = soft(router, token)
    chosen = largest(p, router.config.top_k)
    return scatter(len(p), {i: p[i] / sum(p[j] for j in chosen) for i in chosen}, p)


def poly(router: Any, token: Token) -> Tensor:
    """z = sigmoid(logits[task]) per head, divided by its sum over the skills."""
    heads = router.task_logits[token.task].view(router.config.num_heads, -1)
    z = 1 / (1 + (-heads).exp())
    return torch.cat([head / (sum(head) + 1e-12) for head in z])


def xlora(router: Any, token: Token) -> Tensor:
    """Linear, ReLU, Linear on the hidden state; softmax over the first layer's experts."""
    first, _, _, last = router.head
    hidden = (first.weight @ token.x + first.bias).clamp(min=0)
    logits = last.weight @ hidden + last.bias
    return softmax(logits[: router.num_experts] / router.config.temperature) * router.config.global_weight


# experts: (bank, base linear, x (D,), gates (E,)) -> y (O,)


def base_row(base: Any, x: Tensor) -> Tensor:
    return base.weight @ x if base.bias is None else base.weight @ x + base.bias


def own_columns(bank: Any, expert: int) -> slice:
    start = sum(bank.ranks[:expert])
    return slice(start, start + bank.ranks[expert])


def lora_update(bank: Any, expert: int, x: Tensor) -> Tensor:
    """s_e B_e A_e x."""
    own = own_columns(bank, expert)
    return bank.scale[expert] * (bank.lora_B[:, own] @ (bank.lora_A[own] @ x))


def lora(bank: Any, base: Any, x: Tensor, gates: Tensor) -> Tensor:
    y = base_row(base, x)
    for expert in range(len(bank.ranks)):
        y = y + gates[expert] * lora_update(bank, expert, x)
    return y


def hydra(bank: Any, base: Any, x: Tensor, gates: Tensor) -> Tensor:
    """One A for all experts."""
    y = base_row(base, x)
    for expert in range(len(bank.ranks)):
        y = y + gates[expert] * bank.scale[expert] * (bank.lora_B[:, own_columns(bank, expert)] @ (bank.lora_A @ x))
    return y


def dora_row(bank: Any, base: Any, expert: int, x: Tensor) -> Tensor:
    """m (W + s B A) x / ‖W + s B A‖ + bias, the norm a constant."""
    own = own_columns(bank, expert)
    moved = base.weight + bank.scale[expert] * bank.lora_B[:, own] @ bank.lora_A[own]
    y = bank.magnitude[expert] / moved.detach().norm(dim=1) * (moved @ x)
    return y if base.bias is None else y + base.bias


def dora(bank: Any, base: Any, x: Tensor, gates: Tensor) -> Tensor:
    """What expert e changes about the layer, times its gate."""
    y = base_row(base, x)
    changes = [dora_row(bank, base, e, x) - base_row(base, x) for e in range(len(bank.ranks))]
    return y + sum(gate * change for gate, change in zip(gates, changes, strict=True))


def averaged(bank: Any, base: Any, x: Tensor, gates: Tensor) -> Tensor:
    """Poly, MHR: per head the averages of A and of B, then one product."""
    num_heads, num_experts = bank.lora_A.shape[:2]
    w = gates.view(num_heads, num_experts)
    A = [sum(w[h, e] * bank.lora_A[h, e] for e in range(num_experts)) for h in range(num_heads)]
    B = [sum(w[h, e] * bank.lora_B[h, e] for e in range(num_experts)) for h in range(num_heads)]
    return base_row(base, x) + bank.scale[0] * (torch.cat(B) @ (torch.cat(A, dim=1) @ x))


def shards(bank: Any, base: Any, x: Tensor, gates: Tensor) -> Tensor:
    """MoS: every vector is c shards side by side, named by the layer's frozen indices."""
    c, rank = bank.config.shards_per_vector, bank.ranks[0]
    rows_A = [torch.cat([bank.pool.pool_A[i] for i in bank.index_A[r * c : (r + 1) * c]]) for r in range(rank)]
    rows_B = [torch.cat([bank.pool.pool_B[i] for i in bank.index_B[r * c : (r + 1) * c]]) for r in range(rank)]
    return base_row(base, x) + gates[0] * bank.scale[0] * sum(b * (a @ x) for a, b in zip(rows_A, rows_B, strict=True))


# losses: (loss, trace) -> scalar, over the tokens that are real


def real_tokens(decision: Any) -> list[int]:
    mask = decision.context.token_mask
    count = decision.routing.expert_ids.shape[0]
    return [t for t in range(count) if mask is None or bool(mask[t])]


def mean(values: list[Any]) -> Any:
    return sum(values) / len(values)


def switch(decisions: list[Any], soft_mass: bool = False) -> tuple[list[Any], list[Any]]:
    """f (E,) slots per token, or mean weights; P (E,) mean probability."""
    num_experts = decisions[0].routing.num_experts
    f, P = [], []
    for e in range(num_experts):
        chosen, probability = [], []
        for d in decisions:
            for t in real_tokens(d):
                slots = [k for k, i in enumerate(d.routing.expert_ids[t].tolist()) if i == e]
                chosen.append(sum((d.routing.weights[t, k] for k in slots), 0.0) if soft_mass else len(slots))
                probability.append(softmax(d.routing.logits[t])[e])
        f.append(mean(chosen))
        P.append(mean(probability))
    return f, P


def load_balance(loss: Any, trace: Any) -> Any:
    """MixLoRA: E Σ f P over all layers' tokens. MoLA: E Σ (f / Σf) P for each block, summed."""
    groups: dict[str, list[Any]] = {}
    for name, decision in trace.items():
        key = name.split(".")[2] if loss.balance_over == "block" else ""
        groups.setdefault(key, []).append(decision)
    total = 0.0
    for group in groups.values():
        f, P = switch(group, soft_mass=loss.balance_counts == "weights")
        if loss.balance_counts == "shares":
            f = [f_e / sum(f) for f_e in f]
        total = total + len(f) * sum(f_e * P_e for f_e, P_e in zip(f, P, strict=True))
    return loss.balance_coefficient * total


def entropy(loss: Any, trace: Any) -> Any:
    """The mean normalised Tsallis entropy over tokens and linears."""
    rows = [tsallis(softmax(d.routing.logits[t]), loss.entropy_index) for d in trace.values() for t in real_tokens(d)]
    return loss.entropy_coefficient * mean(rows)


def localized_balance(loss: Any, trace: Any) -> Any:
    """LoRAMoE: β Σ_linears Var(Z) / mean(Z)², Z[b, e] = Q[b, e] (1 ± δ)."""
    total = 0.0
    for d in trace.values():
        (rows, length), num_experts = d.context.shape, d.routing.num_experts
        Z = []
        for b in range(rows):
            tokens = [t for t in real_tokens(d) if t // length == b]
            if not tokens:
                continue
            for e in range(num_experts):
                knows = int(d.context.task_ids[tokens[0]]) == 1
                matches = (e < num_experts // 2) == knows
                mass = sum(d.routing.weights[t, d.routing.expert_ids[t].tolist().index(e)] for t in tokens)
                Z.append(mass * (1 + loss.delta if matches else 1 - loss.delta))
        variance = sum((z - mean(Z)) ** 2 for z in Z) / (len(Z) - 1)
        total = total + variance / (mean(Z) ** 2 if loss.squared_mean else mean(Z))
    return loss.localized_coefficient * total


def task_cross_entropy(loss: Any, trace: Any) -> Any:
    """MeteoRA: −log p(the next token's task), over tokens that have a real next token."""
    rows = []
    for d in trace.values():
        real, length = set(real_tokens(d)), d.context.shape[1]
        for t in sorted(real):
            if t % length + 1 < length and t + 1 in real:
                rows.append(-softmax(d.routing.logits[t])[d.context.task_ids[t + 1]].log())
    return loss.task_coefficient * mean(rows)


def specialisation_balance(loss: Any, trace: Any) -> Any:
    """LoRA-Mixer: Σ_e P_e f_e ∓ λ mean entropy, averaged over linears."""
    terms = []
    for d in trace.values():
        p = [softmax(d.routing.logits[t]) for t in real_tokens(d)]
        first = [largest(row, 1)[0] for row in p]
        match = sum(mean([row[e] for row in p]) * first.count(e) / len(p) for e in range(d.routing.num_experts))
        spread = mean([-sum(q * q.log() for q in row) for row in p])
        sign = -1 if loss.entropy_sign == "paper" else 1
        terms.append(match + sign * loss.entropy_weight * spread)
    return loss.specialisation_coefficient * mean(terms)
