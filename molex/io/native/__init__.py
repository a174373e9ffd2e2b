"""Export to native mixture-of-experts checkpoints, one file for each architecture.

molex.io.native.export_native(mixture, "moe/", target="vllm")
"""

from molex.io.native.export import NativeExport, export_native
from molex.io.native.family import TARGETS, Family, Target, families
from molex.io.native.flex_olmo import FlexOlmo
from molex.io.native.granite_moe import GraniteMoe
from molex.io.native.mixtral import Mixtral
from molex.io.native.qwen2_moe import Qwen2Moe
from molex.io.native.qwen3_moe import Qwen3Moe
from molex.io.native.sizes import Forecast

__all__ = [
    "TARGETS",
    "Family",
    "FlexOlmo",
    "Forecast",
    "GraniteMoe",
    "Mixtral",
    "NativeExport",
    "Qwen2Moe",
    "Qwen3Moe",
    "Target",
    "export_native",
    "families",
]
