"""The model card beside a mixture: what it is, on which base, how to load it. Written without asking the network."""

import re
from pathlib import Path

from molex.checks import listed
from molex.io.record import CARD_FILE, MixtureRecord

_MARK = "<!-- Written by molex, anew at each save: delete this line to keep your own text. -->"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(record: MixtureRecord, scratch: Path, directory: Path) -> None:
    """Writes README.md into `scratch`, unless `directory` has one that is not molex's."""
    present = directory / CARD_FILE
    if not present.exists() or _MARK in present.read_text(encoding="utf-8", errors="replace"):
        (scratch / CARD_FILE).write_text(card(record), encoding="utf-8")


def card(record: MixtureRecord) -> str:
    """The card's text: hub metadata, a table, and the lines that load it."""
    return "\n".join([*_metadata(record), "", _MARK, "", *_table(record), "", *_notes(record), *_usage(record), ""])


def _metadata(record: MixtureRecord) -> list[str]:
    name = record.base.name_or_path
    on_hub = _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    tags = ["molex", "lora", "mixture-of-experts"]
    if record.config.method not in tags:
        tags.append(record.config.method)
    base = [f"base_model: {name}"] if on_hub else []
    return ["---", "library_name: molex", *base, "tags:", *[f"- {tag}" for tag in tags], "---"]


def _table(record: MixtureRecord) -> list[str]:
    counts = [layer.num_experts for layer in record.layers.values()]
    spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    rows = {
        "method": record.config.method,
        "base": f"{record.base.class_name}, {record.num_parameters['base']:,} parameters",
        "experts per layer": spread,
        "experts": listed(list(record.experts), limit=16),
        "layers converted": str(len(record.layers)),
        "parameters of the mixture": f"{record.num_parameters['stored']:,}",
    }
    title = f"# A mixture of LoRA experts ({record.config.method})"
    return [title, "", "| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows.items()]]


def _notes(record: MixtureRecord) -> list[str]:
    if not record.also_trained:
        return []
    names = ", ".join(f"`{name}`" for name in record.also_trained)
    text = f"Trained and saved whole: {names}."
    if record.base.included:
        text += " The base in this folder has them as trained: they are not the original base's."
    return [text, ""]


def _usage(record: MixtureRecord) -> list[str]:
    lines = [
        "```python",
        "import molex",
        "",
        'mixture = molex.load("path/of/this/folder")',
        "model = mixture.model",
        "```",
    ]
    if record.base.included:
        lines += ["", f"`{record.base.class_name}.from_pretrained` on this folder gives the base alone."]
    return lines
