"""The engine on transformers' continuous batching: requests join and leave between steps, whatever their adapters.

Keys and values lie in pages, prompts are fed in chunks beside other requests' single tokens, and a prefix that an
earlier request of the same adapter had is not computed again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex.checks import check_range
from molex.errors import BackendError, ConfigError
from molex_serve.engine.base import EngineStats
from molex_serve.engine.common import AdaptedModel, RosterEngine
from molex_serve.engine.roster import Live
from molex_serve.engine.upstream import require_tested
from molex_serve.errors import Unavailable
from molex_serve.settings import EngineSettings

_MASKED = ("eager", "sdpa", "paged|eager")  # attentions that get a mask, which the host would have to copy each step


class NotPaged(BackendError):
    """Continuous batching cannot run this model; the static engine can."""

    def __init__(self, reason: object):
        super().__init__(f"continuous batching cannot run this model: {reason}; use the static engine")


class ContinuousEngine(RosterEngine):
    """overlap: prepare a step while the device computes the one before; None = on a GPU whose attention has no mask.
    Raises NotPaged where it cannot run this model, BackendError where it cannot with this transformers."""

    def __init__(
        self,
        served: AdaptedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EngineSettings,
        overlap: bool | None = None,
    ):
        model = served.model
        require_tested(transformers.__version__)
        from molex_serve.engine.bridge.manager import Manager  # not before: it may be unable to import

        check_range("page_tokens", settings.page_tokens, 4)
        reason = why_not_paged(model)
        if reason:
            raise NotPaged(reason)
        if overlap is None:
            overlap = model.device.type == "cuda" and model.config._attn_implementation not in _MASKED
        self._set_up(served, tokenizer, settings)
        self.two_passes = settings.two_passes
        try:
            self.manager = Manager(served, settings, self.roster, overlap)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(f"cache_tokens={settings.cache_tokens} do not fit into memory: {error}") from error
        except ValueError as error:
            raise NotPaged(error) from error
        self._bound(self.manager.capacity)

    def start(self) -> None:
        with self._alone:
            self.manager.start()
            self.roster.open()

    def alive(self) -> bool:
        return self.manager.is_running() and self.manager.background_thread_status.fatal_error is None

    def stats(self) -> EngineStats:
        running = self._num_running()
        return EngineStats(
            running=running,
            waiting=max(0, len(self.roster) - running),
            cache_free=self.manager.num_free_tokens(),
            cache_total=self.manager.capacity,
            steps=self.manager.rows.num_steps,
            step_adapters=len(self.manager.rows.last.present),
            prefix_hits=self.manager.prefix_hits,
        )

    def _num_running(self) -> int:
        return self.manager.num_running()

    def _send(self, live: Live) -> None:
        self.manager.submit(live)

    def _wake(self) -> None:
        self.manager.wake()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Before it starts and after it ended, always."""
        if not self.manager.is_running():
            yield
            return
        try:
            pause = self.manager.pause()
            pause.__enter__()
        except RuntimeError as error:
            raise Unavailable(f"the engine failed: {error}") from error
        try:
            yield
        finally:
            pause.__exit__(None, None, None)

    def _plain_attention(self) -> AbstractContextManager[None]:
        return self.manager.plain_attention()

    def _end(self) -> None:
        if self.manager.is_running():
            self.manager.stop(block=True)


def why_not_paged(model: PreTrainedModel) -> str | None:
    """What transformers does not notice itself, and would silently compute something else for."""
    if not model.is_backend_compatible():
        return "its layers do not hand their arguments on to attention"
    masked = model.config._attn_implementation in _MASKED
    if masked and getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "its attention has a soft cap, which only flash attention keeps over pages"
    return None
