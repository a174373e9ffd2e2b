"""Attribution against routers whose choice is known token by token.

The workbench's base answers, since its experts add nothing here (B = 0). A hook counts the lines that each row has
begun to answer; the router gives the expert of that number most of the weight. So the right attribution is known
without the parser: while answer i is written, i - 1 line ends have been read, and expert i - 1 is at work.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import molex
from molex import workbench
from molex.evaluation.composite.attribution import answer_gates, attribute, tokens_of
from molex.evaluation.composite.generation import Asker, Generation, gates_of_steps
from molex.evaluation.composite.metrics import Score
from molex.evaluation.composite.parsing import Span, find_answers
from molex.mixture import Mixture
from molex.routers.base import Router
from molex.routing import RouteContext, Routing, dense_routing
from molex.workbench.tokenizer import load_tokenizer
from tests.models import mixture_of

NUM_EXPERTS, NEWLINE = 4, ord("\n")
PROMPTS = ["1. double: abc\n= ", "1. swap: xyz\n2. double: ab\n3. swap: pqrs\n= ", "1. double: k\n2. swap: lm\n= "]
TOKENIZER = load_tokenizer()


class Script:
    """What the model has read: a forward pre-hook. `lines` (B,): line ends after the prompt; `forwards` so far."""

    def __init__(self) -> None:
        self.lines, self.forwards = torch.zeros(0, dtype=torch.long), 0

    def __call__(self, module: object, args: object, arguments: dict[str, Any]) -> None:
        ids_BS = arguments["input_ids"]
        self.forwards = 1 if ids_BS.shape[1] > 1 else self.forwards + 1
        self.lines = torch.zeros(len(ids_BS), dtype=torch.long) if self.forwards == 1 else self.lines
        self.lines = self.lines + (ids_BS[:, 0] == NEWLINE if self.forwards > 1 else 0)

    def chosen(self) -> Tensor:
        return self.lines.clamp(max=NUM_EXPERTS - 1)


class Scripted(Router):
    """`choose(forwards, chosen) -> (B, K) ids and weights` at the last position; elsewhere the last expert alone."""

    def __init__(self, script: Script, choose: Callable[[Tensor], tuple[Tensor, Tensor]]):
        super().__init__(NUM_EXPERTS)
        self.script, self.choose = script, choose

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        num_rows, length = ctx.shape
        last_ids, last_weights = self.choose(self.script.chosen())
        ids = torch.full((num_rows, length, last_ids.shape[1]), -1)
        ids[:, :, 0], weights = NUM_EXPERTS - 1, torch.zeros(ids.shape)
        weights[:, :, 0] = 50.0
        ids[:, -1], weights[:, -1] = last_ids, last_weights
        return Routing(ids.flatten(0, 1), weights.flatten(0, 1), None, NUM_EXPERTS)


def sparse(chosen_B: Tensor) -> tuple[Tensor, Tensor]:
    """Two experts: the chosen one and the next."""
    ids_BK = torch.stack([chosen_B, (chosen_B + 1) % NUM_EXPERTS], dim=1)
    return ids_BK, torch.tensor([0.75, 0.25]).expand(len(chosen_B), 2)


def dense(chosen_B: Tensor) -> tuple[Tensor, Tensor]:
    """All experts: 0.7 for the chosen one, 0.1 for each other."""
    ids_BE = torch.arange(NUM_EXPERTS).expand(len(chosen_B), NUM_EXPERTS)
    return ids_BE, torch.where(ids_BE == chosen_B[:, None], 0.7, 0.1)


def scripted(method: str, choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Mixture:
    """A mixture over the workbench's base whose every decision follows a script."""
    script = Script()
    mixture = molex.convert(
        workbench.load_base().eval(), molex.preset(method, num_experts=NUM_EXPERTS, rank=2, dropout=0.0)
    )
    mixture.model.register_forward_pre_hook(script, with_kwargs=True)
    router = Scripted(script, choose)
    for layer in mixture.layers.values():
        if layer.router is not None and not layer.plain:
            layer.router = router
    if mixture.head is not None:
        decide = lambda hidden_TD: _for_all_layers(mixture, router, hidden_TD)  # noqa: E731
        mixture.head.decide = decide  # type: ignore[assignment]
    return mixture


def _for_all_layers(mixture: Mixture, router: Scripted, hidden_TD: Tensor) -> list[Routing]:
    num_rows = len(router.script.lines)
    return [router(hidden_TD, RouteContext((num_rows, len(hidden_TD) // num_rows)))] * len(mixture.layers)


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora"])
@pytest.mark.parametrize("choose", [sparse, dense])
def test_every_answer_is_its_experts(method: str, choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Rows of unlike lengths in one batch: padded on the left, and ending at different steps."""
    mixture = scripted(method, choose)
    made = Asker(tokenizer=TOKENIZER).ask(mixture.model, PROMPTS, 40, mixture)
    lengths = [len(generation.ids) for generation in made]
    assert len(set(lengths)) == 3, "rows end at different steps"
    for generation, count in zip(made, (1, 3, 2), strict=True):
        assert generation.gates is not None
        assert generation.gates.shape == (len(generation.ids), NUM_EXPERTS)
        spans = find_answers(generation.text, count)
        assert all(spans), generation.text
        for answer, gates_E in enumerate(answer_gates(generation, spans, TOKENIZER)):
            ids_1K, weights_1K = choose(torch.tensor([answer]))
            expected_E = Routing(ids_1K, weights_1K, None, NUM_EXPERTS).gates()[0]
            torch.testing.assert_close(gates_E, expected_E)


def test_each_token_has_the_gates_of_the_forward_that_made_it() -> None:
    """The weight is the number of the forward: token t comes out of forward t + 1, counted from 1."""
    mixture = scripted("mola", sparse)
    router = next(layer.router for layer in mixture.layers.values())
    assert isinstance(router, Scripted)
    router.choose = lambda chosen_B: (
        torch.zeros(len(chosen_B), 1, dtype=torch.long),
        torch.full((len(chosen_B), 1), float(router.script.forwards)),
    )
    for generation in Asker(tokenizer=TOKENIZER, batch_size=2).ask(mixture.model, PROMPTS, 40, mixture):
        assert generation.gates is not None
        assert generation.gates[:, 0].tolist() == list(range(1, len(generation.ids) + 1))


def test_gates_are_means_over_layers() -> None:
    """Layer l gives expert 0 the weight l, of layers with unlike numbers of experts."""
    mixture = mixture_of("llama", "mola", allocation=(2, 5), num_hidden_layers=2)
    for depth, layer in enumerate(mixture.layers.values()):
        layer.router = _Weighs(layer.experts.num_experts, float(depth))
    with mixture.record() as steps, torch.no_grad():
        mixture.model(input_ids=torch.arange(6).view(2, 3))
    gates_BSE = gates_of_steps(mixture, steps, 2)
    num_layers = len(mixture.layers)
    assert gates_BSE is not None
    assert gates_BSE.shape == (2, 1, 5)
    torch.testing.assert_close(gates_BSE[:, 0, 0], torch.full((2,), (num_layers - 1) / 2))
    torch.testing.assert_close(gates_BSE[:, 0, 4], torch.full((2,), 0.5))  # half of the layers have a fifth expert


class _Weighs(Router):
    def __init__(self, num_experts: int, weight: float):
        super().__init__(num_experts)
        self.weight = weight

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        weights_TE = torch.ones(len(x), self.num_experts)
        weights_TE[:, 0] = self.weight
        return dense_routing(weights_TE, None)


def test_heads_are_averaged() -> None:
    """MHR gates each expert once a head: an expert's weight is the mean over its heads."""
    mixture = mixture_of("llama", "mhr", num_tasks=2)
    for name, parameter in mixture.model.named_parameters():
        if name.endswith("task_logits"):
            parameter.data.normal_()
    with mixture.record() as steps, mixture.using(tasks=[0, 1]), torch.no_grad():
        mixture.model(input_ids=torch.arange(6).view(2, 3))
    gates_BSE = gates_of_steps(mixture, steps, 2)
    assert gates_BSE is not None
    gates_BHE = torch.stack([d.routing.weights[[2, 5]].view(2, -1, 3) for d in steps[0].values()])
    torch.testing.assert_close(gates_BSE[:, 0], gates_BHE.mean((0, 2)))


def test_one_expert_is_no_routing() -> None:
    mixture = molex.convert(workbench.load_base(), molex.preset("lora", dropout=0.0))
    (generation,) = Asker(tokenizer=TOKENIZER).ask(mixture.model, PROMPTS[:1], 4, mixture)
    assert generation.gates is None


def test_plain_layers_are_no_routing() -> None:
    """MixLoRA's attention has one LoRA beside the experts; it does not count as expert 0."""
    mixture = scripted("mixlora", dense)
    assert any(layer.plain for layer in mixture.layers.values())
    (generation,) = Asker(tokenizer=TOKENIZER).ask(mixture.model, PROMPTS[:1], 8, mixture)
    assert generation.gates is not None
    torch.testing.assert_close(generation.gates.sum(1), torch.ones(len(generation.ids)))


def test_tokens_of_a_span_by_their_text() -> None:
    """Bytes are tokens; a letter of two bytes belongs to a span as a whole from its first byte."""
    text = "1. né\n2. xyz"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text) + 1
    start = text.index("xyz")
    assert tokens_of(Span(start, start + 3), ids, TOKENIZER) == range(start + 1, start + 4)
    assert tokens_of(Span(3, 4), ids, TOKENIZER) == range(3, 4)


def test_the_table() -> None:
    """Two tasks of their own experts and one without; ties and means by hand."""
    gates = {"a": [[0.6, 0.4, 0.0], [0.2, 0.8, 0.0]], "b": [[0.1, 0.9, 0.0]], "c": [[0.0, 0.0, 1.0]]}
    answers = [(task, torch.tensor(row)) for task, rows in gates.items() for row in rows]
    found = attribute([*answers, ("a", None)], ["a", "b", "other"], {"a": "a", "b": "b"})
    assert found is not None
    assert found.weights["a"] == pytest.approx({"a": 0.4, "b": 0.6, "other": 0.0})
    assert found.dominant["a"] == {"a": 0.5, "b": 0.5, "other": 0.0}
    assert found.own["a"].value == 0.5
    assert found.own["b"] == Score(1.0, None)
    assert "c" not in found.own
    assert found.own_overall is not None
    assert found.own_overall.value == pytest.approx(2 / 3)


def test_nothing_recorded_is_no_attribution() -> None:
    generation = Generation("1. a", (1, 2, 3, 4))
    assert answer_gates(generation, [Span(3, 4)], TOKENIZER) == [None]
    assert attribute([("a", None)], ["a"], {}) is None
