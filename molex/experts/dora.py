"""DoRA experts (arXiv 2402.09353), MixLoRA's MixDoRA option: a trained length for every row of every expert.

    expert e:  f_e ⊙ (W x + s B_e A_e x),   f_e = m_e / ‖W + s B_e A_e‖_row  (the norm is a constant for autograd)

m_e starts at ‖W‖_row, so f_e = 1 and the model starts as the base. The norm never forms W + sBA:
‖W + sBA‖² = ‖W‖² + 2s Σ_r B ⊙ (W Aᵀ) + s² Σ_r (B (A Aᵀ)) ⊙ B, row by row. f differs per expert, so the base cannot
be shared by the streams of a feed-forward block: `narrow` runs it once per stream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.distributed import gathered
from molex.errors import ConfigError, StateError, TargetError
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, LoRA, Route, expert_kinds
from molex.experts.lora import LoRABank, everyone
from molex.kernels import Columns, Form, Planner
from molex.kernels.base import mix_streams


@expert_kinds.register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRAConfig(ExpertsConfig):
    """LoRA experts with a magnitude each. The base's weight must be a float matrix."""

    def build(self, shape: LayerShape) -> ExpertBank:
        return DoRABank(shape)


class DoRABank(LoRABank):
    """lora_A (C, D), lora_B (O, C), magnitude (E, O)."""

    gives_activations = False

    def __init__(self, shape: LayerShape):
        super().__init__(shape)
        weight = getattr(shape.base, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TargetError(f"{shape.name}: DoRA experts need a float base weight; use experts='lora' here")
        if weight.is_meta and shape.device.type != "meta":
            raise TargetError(f"{shape.name}: DoRA experts read the base weight: it is offloaded; use experts='lora'")
        with gathered([weight]):
            self.transposed = weight.shape[0] != shape.out_features or type(shape.base).__name__ == "Conv1D"
            norms_EO = self.norms(weight.detach())
        self.magnitude = nn.Parameter(norms_EO.to(shape.dtype))

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """‖W + s_e B_e A_e‖ of every row: (E, O), float32 or wider, out of autocast's reach."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        W_OD = (weight.T if self.transposed else weight).to(dtype)
        columns = self.columns().to(dtype)
        rows = []
        with torch.autocast(weight.device.type, enabled=False):
            squared_O = W_OD.square().sum(1)
            for expert_id in range(self.num_experts):
                A_RD, B_OR = columns.expert(expert_id)
                sB_OR = self.scale[expert_id].to(dtype) * B_OR
                added_O = (sB_OR * (2 * W_OD @ A_RD.T + sB_OR @ (A_RD @ A_RD.T))).sum(1)
                rows.append((squared_O + added_O).clamp(min=0).sqrt())
        return torch.stack(rows)

    def forward(self, x: Tensor, base: nn.Module, route: Route, planner: Planner, form: Form = "linear") -> Tensor:
        columns, factor_EO = self._stretched(base)
        columns = columns.to(x.dtype)
        dropped = self.dropout(x)
        routing = route(None)
        backend = planner.pick(x, columns, routing, base, form)
        y = base(x)
        bias = getattr(base, "bias", None)
        plain = y if bias is None else y - bias.to(y.dtype)
        excess_EO = (factor_EO - 1).to(y.dtype)
        if form == "linear":
            stretch = (routing.gates().to(y.dtype) @ excess_EO).view(y.shape)
            return y + plain * stretch + _fit(backend.delta(flat(dropped), columns, routing.scaled(self.scale)), y)
        stretch_KTO = excess_EO[routing.expert_ids.T.clamp(min=0)] * (routing.expert_ids.T >= 0)[..., None]
        if form == "widen":
            deltas = backend.widen_delta(flat(dropped), columns, everyone(routing).scaled(self.scale))
            stretched = y + plain * stretch_KTO.view(-1, *y.shape) + deltas.view(-1, *y.shape).to(y.dtype)
            return torch.cat([y[None], stretched]) if routing.base_streams else stretched
        own = slice(routing.base_streams, None)
        stretched = torch.cat([y[: own.start], y[own] + plain[own] * stretch_KTO.view(y[own].shape)])
        rows_KTD = dropped[own].reshape(stretch_KTO.shape[0], -1, x.shape[-1])
        delta_TO = backend.narrow_delta(rows_KTD, columns, routing.scaled(self.scale))
        return mix_streams(stretched, routing.weights) + _fit(delta_TO, y[0])

    def _stretched(self, base: nn.Module) -> tuple[Columns, Tensor]:
        """The columns with each expert's row factors folded into B, and the factors (E, O)."""
        weight = base.weight
        assert isinstance(weight, Tensor)
        if weight.numel() == 0:
            raise StateError("DoRA experts read the base weight, which is sharded away here; use ZeRO-2 or FSDP")
        norms_EO = self.norms(weight)
        factor_EO = self.magnitude.to(norms_EO.dtype) / norms_EO.clamp(min=torch.finfo(norms_EO.dtype).tiny)
        columns = self.columns()
        return columns._replace(B=columns.B * factor_EO[columns.expert_of_column].T), factor_EO

    def weight(self, expert_id: int, base: Tensor) -> Tensor:
        A_RD, B_OR, scale = super().expert(expert_id)
        dtype = torch.promote_types(base.dtype, torch.promote_types(B_OR.dtype, torch.float32))
        W_OD = base.to(dtype) + scale * (B_OR.to(dtype) @ A_RD.to(dtype))
        norm_O = W_OD.norm(dim=1).clamp(min=torch.finfo(dtype).tiny)
        return (self.magnitude[expert_id].to(dtype) / norm_O)[:, None] * W_OD

    def check_expert(self, expert_id: int, lora: LoRA) -> None:
        raise ConfigError("a DoRA expert is more than A and B: its magnitude; load a LoRA into experts='lora'")

    def expert(self, expert_id: int) -> LoRA:
        raise ConfigError("a DoRA expert rescales the base's rows: it is more than one A and one B added to the base")


def flat(x: Tensor) -> Tensor:
    """(..., D) -> (T, D)."""
    return x.reshape(-1, x.shape[-1])


def _fit(delta: Tensor, y: Tensor) -> Tensor:
    return delta.view(y.shape).to(y.dtype)
