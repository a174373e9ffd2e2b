"""Transformers' manager of continuous batching, made of our parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
    ProtoPretrainedModel,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
from transformers.generation.continuous_batching.utils import attn_mask_is_needed

from molex_serve.engine.bridge.first import first_cache
from molex_serve.engine.bridge.rows import SteppedModel, StepRows, live_of
from molex_serve.engine.bridge.scheduler import NAME, FairScheduler
from molex_serve.engine.common import AdaptedModel
from molex_serve.engine.finite import finite
from molex_serve.engine.mla import padded, page_width, sized_pages
from molex_serve.engine.prefix import PrefixSalt
from molex_serve.engine.roster import Live, Roster
from molex_serve.engine.scheduler import Places
from molex_serve.settings import EngineSettings


class Outlet(OutputRouter):
    """Gives every output to the request's own listener."""

    def __init__(self, roster: Roster):
        super().__init__()
        self.roster = roster

    def deliver(self, output: GenerationOutput) -> None:
        live = self.roster.find(output.request_id)
        if live is None:
            return
        if output.status == RequestStatus.FAILED:
            self.roster.finish(live, "error", output.error)
            return
        tokens = output.generated_tokens[live.delivered :]
        over = "stop" if tokens and tokens[-1] in live.ends else "length"
        self.roster.advance(live, tokens, over if output.is_finished() else None)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class Manager(ContinuousBatchingManager):
    """overlap: the next step is prepared while the device computes this one. prefix_hits: tokens not computed again."""

    def __init__(
        self,
        served: AdaptedModel,
        settings: EngineSettings,
        roster: Roster,
        overlap: bool,
    ):
        config = ContinuousBatchingConfig(
            page_size=settings.page_tokens,
            num_blocks=max(1, settings.cache_tokens // settings.page_tokens),
            max_batch_tokens=settings.step_tokens,
            max_requests_per_batch=min(settings.step_requests, settings.step_tokens),
            allow_block_sharing=settings.prefix_cache,
            use_async_batching=overlap,
            use_cuda_graph=False,  # what adapters a step has is decided on the host
            scheduler_type=NAME,
            auto_switch_to_flash=False,
        )
        super().__init__(
            cast(ProtoPretrainedModel, served.model), GenerationConfig(do_sample=False, eos_token_id=-1), config
        )
        self.settings, self.roster, self.prefix_hits = settings, roster, 0
        self.logit_processor = self.rows = StepRows()
        self.output_router = Outlet(roster)
        self.stepped = SteppedModel(served, self.rows)
        self.batch_processor = self._create_batch_processor()  # here, and not on the thread: what cannot run, raises
        self.capacity = infer_max_single_request_tokens(self.batch_processor.cache)

    def submit(self, live: Live) -> None:
        sampling = live.request.sampling
        self.add_request(
            list(live.request.prompt_ids),
            request_id=live.key,
            max_new_tokens=sampling.max_tokens,
            streaming=True,
            eos_token_id=sorted(live.ends),
            live=live,
        )

    def wake(self) -> None:
        self._wake_up_loop.set()

    def num_running(self) -> int:
        return len(self.batch_processor.scheduler.active_requests) if self.batch_processor else 0

    def num_free_tokens(self) -> int:
        """Of the cache; pages kept for their prefix are free, since whoever needs them gets them."""
        if self.batch_processor is None:
            return 0
        cache = self.batch_processor.cache
        kept = sum(len(own.ledger.cached_blocks) * own.bytes_per_block for own in cache.cache_allocators.values())
        free = cache.compute_free_capacity(relative=False) + kept
        return int(self.capacity * free / (cache.num_sectors * cache.bytes_per_sector))

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """What stands for eager attention here computes no ordinary call."""
        if self.model.config._attn_implementation != "paged|eager":
            yield
            return
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation("paged|eager")

    def _generation_step(self) -> None:
        assert self.batch_processor is not None
        self.batch_processor._generation_step(self.stepped)

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            error = self.background_thread_status.fatal_error
            self.roster.close("the engine stopped" if error is None else f"the engine failed: {error}")

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        if self.batch_processor is not None:
            return super()._create_batch_processor()
        config = self.model.config.get_text_config()
        with sized_pages(config):
            processor = super()._create_batch_processor()
        scheduler = processor.scheduler
        assert isinstance(scheduler, FairScheduler)
        scheduler.places = Places(self.settings.step_adapters, self.settings.drain_steps)
        scheduler.begin = self.roster.begin
        scheduler.leave = lambda live: self.roster.finish(live, "cancelled")
        self._salt_prefixes(processor.cache, scheduler)
        caches: list[Any] = [processor.cache]  # their `update` is wrapped, which hides their type
        if self.settings.two_passes:
            self.stepped.first_cache = first_cache(processor.cache)
            caches.append(self.stepped.first_cache)
        width = page_width(config)
        for cache in caches:
            if width is not None:
                cache.update = padded(cache.update, width)
            if attn_mask_is_needed(self.model.config):
                cache.update = finite(cache.update)
        return processor

    def _salt_prefixes(self, cache: PagedAttentionCache, scheduler: FairScheduler) -> None:
        """Has a cache find prefixes among those of the same adapter. Both ways matter: blocks that are complete are
        replaced by equal ones, too."""
        search, mark, salt = cache.search_prefix_match, cache.mark_complete_blocks, PrefixSalt()

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            owner = _owner(scheduler.waiting_requests[request_id])
            num_found = search(request_id, salt.apply(owner, prompt_ids))
            self.prefix_hits += num_found
            return num_found

        def mark_complete_blocks(state: RequestState, complete_blocks: dict[str, int]) -> None:
            if complete_blocks:
                salted = copy(state)
                salted.initial_tokens = salt.apply(_owner(state), state.initial_tokens)
                mark(salted, complete_blocks)

        cache.search_prefix_match = search_prefix_match
        cache.mark_complete_blocks = mark_complete_blocks


def _owner(state: RequestState) -> object:
    """By whom keys and values were computed; None is the base."""
    request = live_of(state).request
    return (request.generation, request.handle, request.task) if request.handle else None
