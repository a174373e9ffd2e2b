"""The weighted sum of the updates, exactly, at the rank that it has:  B A = Σ w_i s_i B_i A_i.

Without weights it is the mean. Averaging A and B apart, which federated averaging and PEFT's "linear" do, is not this:
(ΣB_i)(ΣA_j) has cross terms; it is here as space="factors", for comparison.
"""

from dataclasses import dataclass

from torch import Tensor

from molex.merging.base import rules
from molex.merging.elementwise import ElementwiseRule
from molex.merging.sparsity import weighted_sum


@rules.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearRule(ElementwiseRule):
    """See the module's text."""

    def combine(self, tensors: Tensor, weights: Tensor) -> Tensor:
        return weighted_sum(tensors, weights)
