"""One question over HTTP, as any client would ask it, and what came back."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak.questions import Question

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """alias: "base" is the base. labels: whether tokens are asked for by their names, beside the text. ends: whether
    the answer may end before num_tokens."""

    alias: str
    question: Question
    num_tokens: int
    n: int
    task: int
    chat: bool = False
    labels: bool = False
    stop: str | None = None
    ends: bool = True

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, stream: bool) -> dict[str, Any]:
        question = self.question
        body: dict[str, Any] = {
            "model": self.alias,
            "max_tokens": self.num_tokens,
            "n": self.n,
            "task": self.task,
            "temperature": question.temperature,
            "stream": stream,
            "ignore_eos": not self.ends,
        }
        if self.chat:
            body["messages"] = [{"role": "user", "content": question.user}]
        else:
            body["prompt"] = question.text
        if question.seeds:
            body["seed"] = question.seeds[0]
        if self.labels:
            body["logprobs"] = 0
        if self.stop:
            body["stop"] = self.stop
        return body


@dataclass
class Choice:
    text: str = ""
    finish: str | None = None
    labels: list[str] = field(default_factory=list)


@dataclass
class Answered:
    """error: the code of an error, before or within an answer."""

    status: int
    generation: str | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    error: str = ""
    retry_after: str | None = None

    def add(self, answer: dict[str, Any]) -> None:
        """A whole answer, or a part of one."""
        if "error" in answer:
            self.error = str(answer["error"]["code"])
            return
        self.generation = answer["adapter_generation"]
        for given in answer["choices"]:
            choice = self.choices.setdefault(given["index"], Choice())
            message = given.get("message") or given.get("delta") or {}
            choice.text += given.get("text", message.get("content", ""))
            choice.finish = given["finish_reason"] or choice.finish
            choice.labels += (given.get("logprobs") or {}).get("tokens", [])


async def ask(http: httpx.AsyncClient, asking: Asking) -> Answered:
    response = await http.post(asking.path, json=asking.body(stream=False))
    found = _opened(response)
    found.add(response.json())
    return found


async def ask_stream(http: httpx.AsyncClient, asking: Asking, most_events: int | None = None) -> Answered:
    """most_events: hangs up after as many."""
    async with http.stream("POST", asking.path, json=asking.body(stream=True)) as response:
        found = _opened(response)
        if response.status_code != 200:
            found.add(json.loads(await response.aread()))
            return found
        number = 0
        async for event in _events(response):
            found.add(event)
            number += 1
            if number == most_events:
                break
    return found


def _opened(response: httpx.Response) -> Answered:
    return Answered(response.status_code, retry_after=response.headers.get("retry-after"))


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        text = line.removeprefix("data: ")
        if line and text != "[DONE]":
            yield json.loads(text)
