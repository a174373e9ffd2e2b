"""A mixed batch equals each adapter served alone, token for token, however its steps are cut."""

from dataclasses import replace

import pytest
import torch

from molex.errors import BackendError
from molex_serve.engine.base import Request, Sampling
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.settings import EngineSettings
from tests.models import tiny
from tests.serve.engine.serving import (
    CHUNKED,
    CRAMPED,
    ROOMY,
    Adapted,
    greedy,
    mixed,
    prompt,
    running,
    serve,
    submit,
    tokenizer,
)

SETTINGS = {"roomy": ROOMY, "chunked": CHUNKED, "cramped": CRAMPED, "no prefixes": replace(CRAMPED, prefix_cache=False)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("number", [1, 3, 12])
def test_mixed_batch_equals_each_adapter_alone(number: int, settings: EngineSettings) -> None:
    adapted, requests = Adapted(), mixed(number)
    with running(adapted.engine(settings)) as engine:
        found = serve(engine, requests)
        assert engine.stats().cache_free == engine.stats().cache_total
    assert found == [adapted.generate(request) for request in requests]


def test_cramped_cache_makes_requests_start_anew() -> None:
    adapted, requests = Adapted(), mixed(8, new=20)
    with running(adapted.engine(replace(CRAMPED, prefix_cache=False))) as engine:
        found = serve(engine, requests)
    once = sum(len(request.prompt_ids) + request.sampling.max_tokens - 1 for request in requests)
    assert adapted.num_fed > once, "nothing was preempted: this test shows nothing"
    assert found == [adapted.generate(request) for request in requests]


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt2", "opt"])
def test_other_architectures(name: str) -> None:
    adapted, requests = Adapted(name), mixed(5)
    with running(adapted.engine(CHUNKED)) as engine:
        found = serve(engine, requests)
    assert found == [adapted.generate(request) for request in requests]


def test_eager_attention_is_given_back() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    adapted, requests = Adapted(model=model), mixed(3)
    with running(adapted.engine(CHUNKED)) as engine:
        found = serve(engine, requests)
        assert len(engine.score(requests[0].prompt_ids, 0, None, 0)) == len(requests[0].prompt_ids) - 1
    assert model.config._attn_implementation == "eager"
    assert found == [adapted.generate(request) for request in requests]


def test_steps_name_every_token() -> None:
    adapted, requests = Adapted(), mixed(6)[::-1]
    with running(adapted.engine(replace(CHUNKED, prefix_cache=False))) as engine:
        serve(engine, requests)
        assert engine.stats().steps == len(adapted.steps)
    fed = dict.fromkeys(range(6), 0)
    for step in adapted.steps:
        ends = [span.stop for span in step.spans]
        assert [span.start for span in step.spans] == [0, *ends[:-1]]
        assert step.handles.tolist() == [span.handle for span in step.spans for _ in range(span.start, span.stop)]
        assert len(step.handles) <= 8
        assert step.handles.tolist() == sorted(step.handles.tolist()), "neighbours are of one adapter"
        for span in step.spans:
            fed[span.handle] += span.stop - span.start
    assert fed == {r.handle: len(r.prompt_ids) + r.sampling.max_tokens - 1 for r in requests}


def test_prefixes_are_found_among_one_adapters_own() -> None:
    adapted = Adapted()
    requests = [greedy(str(handle), 21, handle, new=6) for handle in range(6)]
    alone = [adapted.generate(request) for request in requests]
    with running(adapted.engine(CHUNKED)) as engine:
        assert [serve(engine, [request])[0] for request in requests] == alone
        assert engine.stats().prefix_hits == 0
        before = adapted.num_fed
        assert serve(engine, requests) == alone
        assert engine.stats().prefix_hits == 6 * 20
        assert adapted.num_fed - before == 6 * (1 + 5)


def test_equal_prompts_at_once_share_nothing_across_adapters() -> None:
    """Blocks that are complete are replaced by equal ones, too, not only found by new requests."""
    adapted = Adapted()
    requests = [greedy(str(i), 21, i % 6, new=12) for i in range(12)]
    with running(adapted.engine(CHUNKED)) as engine:
        found = serve(engine, requests) + serve(engine, requests)
    assert found == 2 * [adapted.generate(request) for request in requests]


def test_prefixes_depend_on_generation_and_task() -> None:
    adapted = Adapted()
    requests = [greedy(f"{task}", 21, 1, new=6, task=task) for task in (None, 0, 1)]
    with running(adapted.engine(CHUNKED)) as engine:
        assert [serve(engine, [request])[0] for request in requests] == [adapted.generate(r) for r in requests]
        newer = replace(requests[0], generation="another")
        adapted.handle_vectors[1] *= -1
        assert serve(engine, [newer])[0] == adapted.generate(newer)
        assert engine.stats().prefix_hits == 0


def test_score_is_one_plain_forward_of_its_adapter() -> None:
    adapted = Adapted()
    ids = prompt(12)
    with running(adapted.engine(CHUNKED)) as engine:
        scores = engine.score(ids, 2, 1, num_top=3)
        assert len(serve(engine, mixed(2))) == 2
    with adapted.alone(2, 1), torch.no_grad():
        logprobs_TV = adapted.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [score.token_id for score in scores] == list(ids[1:])
    for t, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(logprobs_TV[t, ids[t + 1]]), abs=1e-5)
        best = logprobs_TV[t].topk(3)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_are_the_models_own() -> None:
    """Before temperature and penalties, for greedy rows and for drawn ones, beside rows that ask for none."""
    adapted = Adapted()
    sampling = Sampling(max_tokens=8, temperature=1.7, top_k=5, presence_penalty=1.5, seed=3, logprobs=4)
    requests = [
        Request(id="a", prompt_ids=prompt(9), sampling=sampling, handle=1, generation="g"),
        greedy("b", 5, 2),
        replace(greedy("c", 17, 3), sampling=Sampling(max_tokens=8, temperature=0, logprobs=0)),
    ]
    with running(adapted.engine(CHUNKED)) as engine:
        listeners = [listener.wait() for listener in submit(engine, requests)]
    assert not any(event.logprobs for event in listeners[1].events)
    for request, listener in zip(requests, listeners, strict=True):
        if request.sampling.logprobs is None:
            continue
        with adapted.alone(request.handle), torch.no_grad():
            whole = [*request.prompt_ids, *listener.tokens]
            logprobs_TV = adapted.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found = [logprob for event in listener.events for logprob in event.logprobs]
        assert [logprob.token_id for logprob in found] == listener.tokens
        for t, logprob in enumerate(found, len(request.prompt_ids) - 1):
            assert logprob.logprob == pytest.approx(float(logprobs_TV[t, logprob.token_id]), abs=1e-5)
            assert len(logprob.top) == request.sampling.logprobs
            assert [i for i, _ in logprob.top] == logprobs_TV[t].topk(len(logprob.top)).indices.tolist()


@pytest.mark.parametrize("name", ["mamba", "gemma2"])
def test_models_that_it_would_compute_wrongly_are_refused(name: str) -> None:
    overrides = {"attn_logit_softcapping": 5.0} if name == "gemma2" else {}
    with pytest.raises(BackendError, match="static engine"):
        ContinuousEngine(Adapted(model=tiny(name, **overrides)), tokenizer(), ROOMY)
