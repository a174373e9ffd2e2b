"""One HTML file that shows a generated text coloured by the experts that served it: no network, no libraries.

Each token has the colour of the expert of largest weight, as a mean over layers or in one of them; pointing at it
shows all weights. Colour-blind readers can tell the colours apart; from the 13th expert on they come again, striped.
"""

import base64
import html
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molex.evaluation.routed_text import RoutedText, generate_routed
from molex.io.files import staged
from molex.mixture import Mixture

_TEMPLATE = Path(__file__).parent / "assets" / "routing_page.html"

# CARTO's qualitative scheme "Safe", grey last
_COLOURS = (
    *("#88ccee", "#cc6677", "#ddcc77", "#117733", "#332288", "#aa4499"),
    *("#44aa99", "#999933", "#882255", "#661100", "#6699cc", "#888888"),
)
_LEVELS = 65535  # weights are embedded in 16 bits


def write_page(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, prompt: str, path: str | Path, max_new_tokens: int = 64
) -> RoutedText:
    """Continues the prompt greedily and writes the page. Returns what it shows; raises as `generate_routed` does."""
    text = generate_routed(mixture, tokenizer, prompt, max_new_tokens)
    with staged(Path(path).parent) as scratch:
        (scratch / Path(path).name).write_text(page(text), encoding="utf-8")
    return text


def page(text: RoutedText) -> str:
    """The HTML document of a routed text."""
    dominant = dominant_experts(text.weights.mean(0))
    spans = [_span(token, number, dominant) for number, token in enumerate(text.tokens)]
    parts = {
        "/* experts */": "\n".join(_style(expert) for expert in range(len(text.experts))),
        "<!-- layers -->": "".join(
            f'<option value="{number}">{html.escape(name)}</option>' for number, name in enumerate(text.layers)
        ),
        "<!-- legend -->": "".join(_legend(name, expert, dominant) for expert, name in enumerate(text.experts)),
        "<!-- prompt -->": "".join(spans[: text.num_prompt]),
        "<!-- generated -->": "".join(spans[text.num_prompt :]),
        "<!-- routing -->": _embedded(text),
    }
    document = _TEMPLATE.read_text(encoding="utf-8")
    pieces: list[str] = []
    for mark, part in parts.items():  # each mark once and in this order, so that no part is searched for marks
        before, document = document.split(mark)
        pieces += [before, part]
    return "".join([*pieces, document])


def dominant_experts(weights: Tensor) -> list[int]:
    """The expert of largest weight, by size, for each token of (T, E); -1 where none has any."""
    most_T, expert_T = weights.abs().max(-1)
    return expert_T.where(most_T > 1e-4, -1).tolist()


def _span(token: str, number: int, dominant: list[int]) -> str:
    kinds = ["token"]
    if not token:
        kinds.append("part")
    elif token.startswith("\n"):
        kinds.append("newline")
    if number >= len(dominant):
        kinds.append("unread")
    elif dominant[number] >= 0:
        kinds.append(f"e{dominant[number]}")
    index = 0 if number == 0 else -1  # one stop for the tab key; arrow keys go on from there
    return f'<span class="{" ".join(kinds)}" tabindex="{index}">{html.escape(token)}</span>'


def _legend(name: str, expert: int, dominant: list[int]) -> str:
    share = round(100 * dominant.count(expert) / len(dominant))
    return f'<li><span class="swatch e{expert}"></span> {html.escape(name)} <span class="share">{share}%</span></li>'


def _style(expert: int) -> str:
    cycle, colour = divmod(expert, len(_COLOURS))
    stripes = f"repeating-linear-gradient({35 * cycle}deg, var(--c) 0 2px, transparent 2px 7px)"
    pattern = f" background-image: {stripes};" if cycle else ""
    return f".e{expert} {{ --c: {_COLOURS[colour]};{pattern} }}"


def _embedded(text: RoutedText) -> str:
    """JSON that may stand in a script: "<" would end it. Weights as 16-bit steps from low to high, little-endian."""
    low, high = min(0.0, float(text.weights.min())), max(float(text.weights.max()), 1e-6)
    codes = ((text.weights - low) / (high - low) * _LEVELS).round().to(torch.int32).numpy().astype("<u2")
    content = {
        "experts": text.experts,
        "layers": text.layers,
        "shape": text.weights.shape,
        "low": low,
        "high": high,
        "weights": base64.b64encode(codes.tobytes()).decode(),
    }
    return json.dumps(content).replace("<", "\\u003c")
