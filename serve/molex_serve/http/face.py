"""What every route needs, in one object on the application."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from molex_serve.engine.base import Engine
from molex_serve.http.gate import Gate
from molex_serve.http.mailbox import Mailbox
from molex_serve.http.metrics import Metrics
from molex_serve.http.ports import Adapters, Lease
from molex_serve.http.vocabulary import Vocabulary
from molex_serve.settings import ServerSettings

logger = logging.getLogger(__name__)
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

LEASING_THREADS = 128  # for requests that wait for their adapter's place
WAITING_THREADS = 128  # for all else that waits, such as prompts that are being scored


class Face:
    """Work that takes time goes to threads: one for the tokenizer, which is not to be shared, one that gives leases
    back, which may wait for a step to end, and many that wait. Who waits for a place has threads apart: those who have
    one need a thread to go on, and would never give it back."""

    mail: Mailbox  # onto the event loop, from its start on

    def __init__(
        self, engine: Engine, adapters: Adapters, tokenizer: PreTrainedTokenizerBase, settings: ServerSettings
    ):
        self.engine, self.adapters, self.settings = engine, adapters, settings
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(engine, adapters)
        self.gate = Gate()
        self.created = int(time.time())
        self._leasing = ThreadPoolExecutor(LEASING_THREADS, "leasing")
        self._waiting = ThreadPoolExecutor(WAITING_THREADS, "waiting")
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self._releasing = ThreadPoolExecutor(1, "releasing")
        self._stopped = False

    def leasing(self, name: str) -> "asyncio.Future[Lease]":
        return asyncio.get_running_loop().run_in_executor(self._leasing, self.adapters.resolve, name)

    def waiting(self, function: Callable[[*Ts], R], *args: *Ts) -> "asyncio.Future[R]":
        return asyncio.get_running_loop().run_in_executor(self._waiting, function, *args)

    def tokenizing(self, function: Callable[[*Ts], R], *args: *Ts) -> "asyncio.Future[R]":
        return asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *args)

    def release(self, lease: Lease) -> None:
        self._releasing.submit(lease.release).add_done_callback(_log_failure)

    async def start(self) -> None:
        self.mail = Mailbox(asyncio.get_running_loop())
        await asyncio.to_thread(self.engine.start)

    async def stop(self, drain_seconds: float) -> None:
        """Stops the engine, once; streams that still run end with an error. Leases are given back."""
        self.gate.close()
        if self._stopped:
            return
        self._stopped = True
        await asyncio.to_thread(self.engine.stop, drain_seconds)

    async def close(self) -> None:
        """After the last response."""
        for threads in (self._leasing, self._waiting, self._tokenizing, self._releasing):
            await asyncio.to_thread(threads.shutdown)


def face_of(request: Request) -> Face:
    return request.app.state.face


def _log_failure(done: "Future[None]") -> None:
    error = done.exception()
    if error is not None:
        logger.error("an adapter's lease could not be given back", exc_info=error)
