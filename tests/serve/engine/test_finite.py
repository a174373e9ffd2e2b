"""Activations that overflow spoil nobody else's tokens, neither beside them nor of prefixes that are found later."""

from dataclasses import replace

import pytest
import torch

from molex_serve.settings import EngineSettings
from tests.models import tiny
from tests.serve.engine.serving import CHUNKED, CRAMPED, Adapted, greedy, mixed, running, serve


@pytest.mark.parametrize("settings", [CHUNKED, CRAMPED], ids=["chunked", "cramped"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("overflow", [float("nan"), float("inf")])
def test_beside_others(overflow: float, attention: str, settings: EngineSettings) -> None:
    model = tiny("llama")
    model.set_attn_implementation(attention)
    adapted, spoiled = Adapted(model=model), greedy("spoiled", 9, 8, new=12)
    adapted.handle_vectors[8] = overflow
    requests = [request for request in mixed(8) if request.handle != 8]
    with running(adapted.engine(settings)) as engine:
        found = serve(engine, [spoiled, *requests])[1:]
        after = serve(engine, [replace(request, id=f"{request.id} again") for request in requests])
    plain = Adapted(model=tiny("llama"))
    expected = [plain.generate(request) for request in requests]
    assert found == expected
    assert after == expected


def test_sane_numbers_are_kept_bit_for_bit() -> None:
    update = Adapted().engine(CHUNKED).manager.batch_processor.cache.update
    keys = torch.tensor([[[[1e17, -1e-30, float("nan"), float("-inf"), 3.0, 1e19, 0.0, -2.5]]]]).expand(1, 2, 1, 8)
    index = torch.tensor([0])
    given = {"read_index": [index], "write_index": [index], "cu_seq_lens_k": {"full_attention": index}}
    found, values = update(keys, keys, 0, {**given, "max_length_k": {"full_attention": 1}})
    assert found[0, 0, 0].tolist() == torch.tensor([1e17, -1e-30, 0, 0, 3, 0, 0, -2.5]).tolist()
    assert torch.equal(found, values)
