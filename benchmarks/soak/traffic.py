"""Clients that ask, leave, send nonsense, and load and unload adapters, each by dice of its own."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import httpx

from benchmarks.soak.asking import BASE, Asking, ask, ask_stream
from benchmarks.soak.contents import TASK, Content
from benchmarks.soak.knowledge import Knowledge, expected
from benchmarks.soak.names import NOBODY
from benchmarks.soak.questions import LONGEST
from benchmarks.soak.server import ALIASES

REQUEST_SECONDS = 90.0  # longer than the server lets anybody wait for an adapter
WRONG = "0" * 12  # no generation
MOST_GONE = 2  # aliases that nobody has, before another is unloaded


class Client:
    """Asks until it is told to stop, or something is wrong."""

    def __init__(self, http: httpx.AsyncClient, known: Knowledge, seed: str):
        self.http, self.known, self.dice = http, known, Random(seed)
        self.actions: dict[Callable[[], Awaitable[None]], float] = {
            self.ask: 40,
            self.ask_stream: 35,
            self.leave_in_the_middle: 12,
            self.leave_early: 5,
            self.send_nonsense: 8,
        }

    async def run(self, until: float) -> None:
        while time.monotonic() < until and not self.known.faults:
            (action,) = self.dice.choices([*self.actions], [*self.actions.values()])
            try:
                async with asyncio.timeout(REQUEST_SECONDS):
                    await action()
            except TimeoutError:
                self.known.fault(f"{action.__name__} hung for {REQUEST_SECONDS} s")
            except httpx.HTTPError as error:
                self.known.fault(f"{action.__name__}: {error!r}")
            self.known.counts["requests"] += 1

    async def ask(self) -> None:
        asking = self._asking()
        with self.known.names.watched(asking.alias) as seen:
            found = await ask(self.http, asking)
            self.known.check(asking, found, seen)

    async def ask_stream(self) -> None:
        asking = self._asking()
        with self.known.names.watched(asking.alias) as seen:
            found = await ask_stream(self.http, asking)
            self.known.check(asking, found, seen)

    async def leave_in_the_middle(self) -> None:
        asking = self._asking()
        with self.known.names.watched(asking.alias) as seen:
            found = await ask_stream(self.http, asking, most_events=self.dice.randrange(1, 6))
            self.known.check(asking, found, seen, whole=False)
        self.known.counts["left"] += found.status == 200

    async def leave_early(self) -> None:
        """Perhaps while the adapter is being loaded, or the request waits."""
        asking = self._asking()
        with self.known.names.watched(asking.alias) as seen:
            try:
                async with asyncio.timeout(self.dice.uniform(0, 0.1)):
                    found = await ask(self.http, asking)
            except TimeoutError:
                self.known.counts["left"] += 1
            else:
                self.known.check(asking, found, seen)

    async def send_nonsense(self) -> None:
        status, path, sent = self.dice.choice(NONSENSE)
        response = await self.http.post(path, **sent)
        self.known.expect(f"nonsense {path} {str(sent)[:80]}", response.status_code, status)
        self.known.counts["nonsense"] += 1

    def _asking(self) -> Asking:
        dice, known = self.dice, self.known
        question = dice.choice(known.questions)
        alias = dice.choices([BASE, *ALIASES], [1 / (1 + place) ** 0.5 for place in range(1 + len(ALIASES))])[0]
        num_tokens = dice.randint(1, min(LONGEST, known.limits[question]))
        n = dice.choice((1, 1, 1, 2 if question.seeds else 3))
        chat = dice.random() < 0.3
        asking = Asking(alias=alias, question=question, num_tokens=num_tokens, n=n, task=TASK, chat=chat)
        if dice.random() < 0.3:
            return replace(asking, stop=self._stop(asking))
        return replace(asking, labels=not chat and dice.random() < 0.5)

    def _stop(self, asking: Asking) -> str | None:
        """Something that one of those who may be asked says."""
        name = self.dice.choice([*self.known.answers])
        text, _ = expected(self.known.answers[name][asking.question][0], asking)
        start = self.dice.randrange(len(text)) if text else 0
        return text[start : start + 2].replace("\ufffd", "") or None


NONSENSE: list[tuple[int, str, dict[str, Any]]] = [
    (400, "/v1/completions", {"json": {"model": BASE, "prompt": "x" * 5000}}),
    (400, "/v1/completions", {"json": {"model": BASE, "prompt": [99999]}}),
    (400, "/v1/completions", {"json": {"model": BASE, "prompt": []}}),
    (400, "/v1/completions", {"json": {"model": BASE, "prompt": "x", "temperature": -1}}),
    (400, "/v1/completions", {"json": {"model": BASE, "prompt": "x", "n": 10000}}),
    (400, "/v1/completions", {"json": {"model": BASE, "prompt": "x", "logit_bias": {"99999": 1}}}),
    (400, "/v1/completions", {"json": ["no", "object"]}),
    (400, "/v1/completions", {"content": b'{"model', "headers": {"Content-Type": "application/json"}}),
    (415, "/v1/completions", {"content": b"hello", "headers": {"Content-Type": "text/plain"}}),
    (413, "/v1/completions", {"json": {"model": BASE, "prompt": "x" * 70000}}),
    (404, "/v1/completions", {"json": {"model": "nobody", "prompt": "x"}}),
    (400, "/v1/chat/completions", {"json": {"model": BASE, "messages": []}}),
    (400, "/v1/chat/completions", {"json": {"model": BASE, "messages": [{"role": "user", "content": "x" * 5000}]}}),
    (404, "/v1/nothing", {"json": {}}),
]


@dataclass
class Administrator:
    """Has aliases name other contents, each time as a generation of its own. locks: an alias is changed by one."""

    http: httpx.AsyncClient
    known: Knowledge
    contents: list[Content]
    root: Path
    locks: dict[str, asyncio.Lock]
    name: str
    pause: float

    def __post_init__(self) -> None:
        self.dice = Random(self.name)
        self.number = 0

    async def run(self, until: float) -> None:
        actions = {self.load: 50, self.unload: 12, self.conflict: 15, self.refused: 15}
        while time.monotonic() < until and not self.known.faults:
            await asyncio.sleep(self.dice.uniform(0, 2 * self.pause))
            (action,) = self.dice.choices([*actions], [*actions.values()])
            gone = [alias for alias in ALIASES if NOBODY in self.known.names.now(alias)]
            if action == self.unload and len(gone) >= MOST_GONE:
                action = self.load
            wanted = gone if gone and action == self.load and self.dice.random() < 0.7 else ALIASES
            alias = self.dice.choice(wanted)
            try:
                async with asyncio.timeout(REQUEST_SECONDS), self.locks[alias]:
                    await action(alias)
            except TimeoutError:
                self.known.fault(f"{action.__name__} hung for {REQUEST_SECONDS} s")
            except httpx.HTTPError as error:
                self.known.fault(f"{action.__name__}: {error!r}")

    async def load(self, alias: str) -> None:
        known, content = self.known, self.dice.choice(self.contents)
        folder, generation = self._again(content)
        known.contents[generation] = content
        before = known.names.now(alias)
        known.names.becomes(alias, *before, generation)
        status = await self._load(alias, folder.name, pin=alias == ALIASES[0] and self.dice.random() < 0.5)
        known.expect(f"loading {content.name}", status, 200, 429)
        known.names.becomes(alias, *((generation,) if status == 200 else before))
        known.counts["loads" if status == 200 else "loads refused"] += 1

    def _again(self, content: Content) -> tuple[Path, str]:
        self.number += 1
        folder = self.root / f"{self.name}-{self.number}"
        return folder, content.again(folder)

    async def _load(self, alias: str, path: str, pin: bool = False, expected: str | None = None) -> int:
        if expected is None and not pin and self.dice.random() < 0.3:  # as vLLM has it
            body = {"lora_name": alias, "lora_path": path, "load_inplace": True}
            return (await self.http.post("/v1/load_lora_adapter", json=body)).status_code
        body = {"alias": alias, "path": path, "pin": pin, "expected_generation": expected}
        return (await self.http.post("/v1/adapters", json=body)).status_code

    async def unload(self, alias: str) -> None:
        known = self.known
        before = known.names.now(alias)
        known.names.becomes(alias, *before, NOBODY)
        response = await self.http.delete(f"/v1/adapters/{alias}")
        known.expect(f"unloading {alias}", response.status_code, 404 if NOBODY in before else 200)
        known.names.becomes(alias, NOBODY)
        known.counts["unloads"] += response.status_code == 200

    async def conflict(self, alias: str) -> None:
        """Nothing changes."""
        self.known.counts["conflicts"] += 1
        if self.dice.random() < 0.5:
            response = await self.http.delete(f"/v1/adapters/{alias}", params={"expected_generation": WRONG})
            gone = NOBODY in self.known.names.now(alias)
            self.known.expect("a wrong unload", response.status_code, 404 if gone else 409)
        else:
            status = await self._load(alias, self.dice.choice(self.contents).folder.name, expected=WRONG)
            self.known.expect("a wrong load", status, 409, 429)

    async def refused(self, alias: str) -> None:
        """Nothing changes."""
        self.known.counts["bad loads"] += 1
        path, wanted = self.dice.choice((("damaged", 422), ("missing", 422), ("../outside", 400), ("/etc", 400)))
        status = await self._load(alias, path)
        self.known.expect(f"loading {path}", status, wanted, 429)
