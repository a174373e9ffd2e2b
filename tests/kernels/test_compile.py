"""torch.compile takes a converted model whole, routing and auxiliary loss included."""

import pytest
import torch
from torch import Tensor

import molex
from molex.gated import GatedForward
from tests.models import tiny


def losses_and_gradients(model: torch.nn.Module, called: torch.nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.zero_grad()
    task_loss = called(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    aux_loss = molex.Mixture.of(model).aux_loss()
    (task_loss + aux_loss).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"task loss": task_loss.detach(), "aux loss": aux_loss.detach(), **grads}


def one_by_one(model: torch.nn.Module) -> None:
    """Has feed-forward blocks run layer by layer in eager too: at once they round less, which 16 bits show."""
    for forward in [vars(module).get("forward") for module in model.modules()]:
        if isinstance(forward, GatedForward):
            forward.remove()


@pytest.mark.parametrize(
    ("backend", "dtype", "method"),
    [
        ("dense", torch.float32, "mixlora"),
        ("dense", torch.bfloat16, "mixlora"),
        ("preload", torch.float32, "mixlora"),
        ("preload", torch.float32, "mola"),
        ("grouped", torch.bfloat16, "mixlora"),
        ("auto", torch.float32, "mola"),
    ],
    ids=str,
)
def test_one_graph_with_the_gradients_of_eager(backend: str, dtype: torch.dtype, method: str) -> None:
    model = tiny("llama", num_hidden_layers=1).to(dtype).train()
    settings = {"allocation": None} if method == "mola" else {}
    overrides = {"num_experts": 4, "top_k": 2, "rank": 8, "dropout": 0.0, "backend": backend, **settings}
    molex.convert(model, molex.preset(method, **overrides))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    if dtype == torch.bfloat16:
        one_by_one(model)
    eager = losses_and_gradients(model, model)
    torch._dynamo.reset()
    compiled = losses_and_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, msg=lambda text, name=name: f"{name}: {text}")
