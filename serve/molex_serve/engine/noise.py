"""Noise that makes the largest score a draw: a fixed function of seed, position and token.

    argmax_v ( s_v + g_v )   with   g_v = -log(-log(u_v))   is   v with probability softmax(s)_v          (Gumbel)

u comes from a counter-based hash, so a request draws the same tokens whoever shares its steps, however its prompt is
cut into chunks, and also when it is computed again after it had to give its place away.
Hashing is 32-bit arithmetic in int64 with multipliers under 2^31: nothing overflows, on any device.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_LOW32 = (1 << 32) - 1
_LOW64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BELOW_ONE = 1 - 2**-24  # the largest float32 under 1: its noise is finite


def noise_keys(places: Iterable[tuple[int, int]]) -> Tensor:
    """(2, R) int32, the low and high halves of each (seed, position)'s key."""
    keys = [_mix(_mix(seed & _LOW64) ^ (position * _GOLDEN & _LOW64)) for seed, position in places]
    signed = [key - (1 << 64) if key >> 63 else key for key in keys]
    return torch.tensor(signed, dtype=torch.int64).view(-1, 1).view(torch.int32).T


def gumbel(keys_2R: Tensor, num_tokens: int) -> Tensor:
    """(R, V) float32 noise of tokens 0 .. num_tokens-1."""
    low_R1, high_R1 = (keys_2R.long() & _LOW32).unsqueeze(-1).unbind(0)
    token_V = torch.arange(num_tokens, device=keys_2R.device)
    x_RV = (token_V * 0x9E3779B1 & _LOW32) ^ low_R1
    x_RV = _round(x_RV, 16, 0x21F0AAAD) ^ high_R1
    x_RV = _round(x_RV, 15, 0x7FEB352D)
    x_RV = _round(x_RV, 15, 0x31848BAB)
    x_RV ^= x_RV >> 14
    rare_RV = x_RV.float().add_(0.5).mul_(2**-32).clamp_(max=_BELOW_ONE)  # 1 - u: exact where u is close to 1
    return rare_RV.neg_().log1p_().neg_().log_().neg_()


def _round(x: Tensor, shift: int, multiplier: int) -> Tensor:
    """One xorshift-multiply round of 32-bit numbers."""
    return (x ^ (x >> shift)).mul_(multiplier).bitwise_and_(_LOW32)


def _mix(x: int) -> int:
    """splitmix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _LOW64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _LOW64
    return x ^ (x >> 31)
