"""Weighted blends: several LoRAs at fixed shares are one LoRA whose columns stand side by side.

    Σ_i w_i s_i B_i A_i  =  [w_1 s_1 B_1 | w_2 s_2 B_2 | …] [A_1; A_2; …]

On disk a blend is a folder with a blend.json: {"adapters": {"../law": 0.6, "../code": 0.4}}, paths seen from there.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from molex.experts import LoRA
from molex.io.files import read_json
from molex.library import Factors
from molex_serve.adapters.base import LowRank
from molex_serve.adapters.content import generation_of_parts
from molex_serve.adapters.lora import check_fits, num_bytes, read_lora
from molex_serve.errors import BadAdapter

BLEND_FILE = "blend.json"


def read_blend(folder: Path, model: nn.Module) -> LowRank:
    """A folder with a blend.json. Raises as `read_lora` does, for its members too."""
    shares = read_json(folder / BLEND_FILE).get("adapters")
    if not isinstance(shares, dict):
        raise BadAdapter(f'{folder / BLEND_FILE} says no "adapters": give a share for each path')
    return blend({folder / path: share for path, share in shares.items()}, model, str(folder))


def blend(shares: Mapping[Path, float], model: nn.Module, source: str) -> LowRank:
    """The members' LoRAs at these shares. Raises BadAdapter on no members, and on shares that are no finite numbers."""
    if not shares:
        raise BadAdapter(f"{source}: a blend has at least one member")
    for path, share in shares.items():
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not abs(share) <= sys.float_info.max:
            raise BadAdapter(f"{source}: the share of {path} is {share!r}, which is no finite number")
    members = {path: read_lora(path, model) for path in shares}
    factors = side_by_side([(members[path].factors, share) for path, share in shares.items()])
    check_fits(factors, model, source)
    return LowRank(
        kind="blend",
        generation=generation_of_parts((members[path].generation, float(share)) for path, share in shares.items()),
        num_bytes=num_bytes(factors),
        source=source,
        factors=factors,
    )


def side_by_side(parts: list[tuple[Factors, float]]) -> Factors:
    """One LoRA of scale 1 for each linear that any of them changes."""
    layers = dict.fromkeys(layer for factors, _ in parts for layer in factors)
    joined = {}
    for layer in layers:
        own = [(factors[layer], share) for factors, share in parts if layer in factors]
        A_CD = torch.cat([lora.A for lora, _ in own])
        B_OC = torch.cat([share * lora.scale * lora.B.to(_wide(lora.B)) for lora, share in own], dim=1)
        joined[layer] = LoRA(A_CD, B_OC, 1.0)
    return joined


def _wide(tensor: Tensor) -> torch.dtype:
    """In which shares and scales round nothing that the base would not."""
    return torch.promote_types(tensor.dtype, torch.float32)
