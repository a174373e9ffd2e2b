"""What the soak serves: adapters of several kinds for the workbench's base, and each alone by its own library."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

import molex
from molex.io.files import write_json
from molex.workbench import load_base
from molex_serve.adapters.content import generation_of, generation_of_parts

LORAS: dict[str, Callable[[], peft.LoraConfig]] = {  # made anew for each use: PEFT writes into them what it found
    "law": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "code": lambda: peft.LoraConfig(r=12, lora_alpha=4, target_modules="all-linear", use_rslora=True),
    "poem": lambda: peft.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj", "up_proj"]),
    "math": lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules=["k_proj", "o_proj", "gate_proj"]),
    "note": lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"]),
}
MEMBERS = ("poem", "math")  # of `gated`
SHARES = {"law": 0.6, "code": -0.4}
MIXTURES: dict[str, dict[str, object]] = {
    "mixlora": {"num_experts": 3, "rank": 2},
    "mola": {"num_experts": 3, "rank": 3, "allocation": None},
    "hydralora": {"num_experts": 3, "rank": 2},
    "mtlora": {"num_experts": 3, "rank": 2},
}
TASK = 1  # told to every adapter; `mtlora` is routed by it
NAMES = (*LORAS, "blend", *MIXTURES, "gated")


@dataclass(frozen=True)
class Content:
    """What an alias may name. alone: the adapter on a base of its own, without a server."""

    name: str
    folder: Path
    alone: Callable[[], PreTrainedModel]

    def again(self, folder: Path) -> str:
        """The same content as another generation, which is returned: the same files, and one that nobody reads."""
        folder.mkdir()
        for path in self.folder.iterdir():
            (folder / path.name).hardlink_to(path)
        write_json(folder / "note.json", {"copy": folder.name})
        return self.generation_in(folder)

    def generation_in(self, folder: Path) -> str:
        """Of a blend the members' files count, and its shares."""
        if self.name != "blend":
            return generation_of(folder)
        return generation_of_parts((generation_of(folder.parent / name), share) for name, share in SHARES.items())


def write_contents(root: Path, names: Collection[str] = NAMES) -> dict[str, Content]:
    """Random ones, as their makers write them; of a blend only its shares of its neighbours are written. The LoRAs that
    others are made of are always written."""
    for name in {*LORAS}.intersection({*names, *SHARES, *MEMBERS}):
        _save_lora(name, root)
    if "blend" in names:
        (root / "blend").mkdir()
        shares = {f"../{name}": share for name, share in SHARES.items()}
        write_json(root / "blend" / "blend.json", {"adapters": shares})
    for name in MIXTURES.keys() & {*names}:
        _save_mixture(molex.convert(load_base(), molex.preset(name, **MIXTURES[name])), root / name)
    if "gated" in names:
        _save_mixture(molex.from_peft(load_base(), {n: root / n for n in MEMBERS}, router="topk"), root / "gated")
    return {name: Content(name, root / name, lambda name=name: _alone(name, root)) for name in names}


def damaged(root: Path) -> Path:
    """A LoRA whose weights end too early."""
    folder = root / "damaged"
    folder.mkdir()
    for path in (root / "law").iterdir():
        cut = 100 if path.suffix == ".safetensors" else None
        (folder / path.name).write_bytes(path.read_bytes()[:cut])
    return folder


def _save_lora(name: str, root: Path) -> None:
    model = peft.get_peft_model(load_base(), LORAS[name]())
    _fill(model, ("lora_B",), name)
    model.save_pretrained(str(root / name))


def _save_mixture(mixture: molex.Mixture, folder: Path) -> None:
    _fill(mixture.model, ("lora_B", "router"), folder.name)
    mixture.save(folder)


def _fill(model: nn.Module, parts: tuple[str, ...], seed: str) -> None:
    """Parameters that training would have moved."""
    generator = torch.Generator().manual_seed(sum(map(ord, seed)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _alone(name: str, root: Path) -> PreTrainedModel:
    base = load_base()
    if name == "blend":
        _add_blend(base, root)
    elif name in LORAS:
        return _merged(name, root)
    else:
        molex.load(base, root / name).set_tasks([TASK])
    return base.eval()


def _merged(name: str, root: Path) -> PreTrainedModel:
    return peft.PeftModel.from_pretrained(load_base(), str(root / name)).merge_and_unload().eval()  # type: ignore


def _add_blend(base: PreTrainedModel, root: Path) -> None:
    """W + Σ_i w_i (W_i − W), W_i merged by PEFT."""
    plain = dict(load_base().named_parameters())
    members = {name: dict(_merged(name, root).named_parameters()) for name in SHARES}
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            for member, share in SHARES.items():
                parameter += share * (members[member][name] - plain[name])
