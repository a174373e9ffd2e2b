"""molex's server beside another one that speaks OpenAI's API, such as vLLM's: the same requests, in turns.

    python -m benchmarks.serving_beside --make runs/beside
    cd runs/beside && molex serve --model base --port 8001 $(cat molex.txt)
    cd runs/beside && vllm serve base --port 8002 --dtype float32 --max-lora-rank 16 --enable-lora --max-loras 16 \\
        --max-model-len 1024 --served-model-name base --lora-modules $(cat vllm.txt)
    python -m benchmarks.serving_beside --servers molex=http://127.0.0.1:8001 vllm=http://127.0.0.1:8002

In a round each server gets `--requests` requests at once, all of the base, all of one adapter, or one for each of 16
adapters, and streams so many new tokens to each. Before, the log-probabilities of greedy answers are compared: so many
answers are the same within 0.001 at every token (after a tie, two programs that round differently go on differently).
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import httpx

from benchmarks.harness import ratios, summary, write
from benchmarks.serving_bases import dense, save_loras
from molex.workbench import load_tokenizer

ADAPTERS, RANK = 16, 16
SECONDS, WARMUP = 300, 2
TOLERANCE = 1e-3
Loads = dict[str, list[str]]  # the model that each request of a round names


class Answer(NamedTuple):
    """Seconds from the request to its first token, and from there to its last one."""

    first: float
    rest: float


def make(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama, LoRAs of it, and the arguments that name them."""
    base = dense(hidden, layers)
    base.save_pretrained(folder / "base")
    load_tokenizer().save_pretrained(folder / "base")
    names = [path.name for path in save_loras(base, folder, ADAPTERS, RANK)]
    (folder / "molex.txt").write_text(" ".join(f"--adapter a{name}={name}" for name in names))
    (folder / "vllm.txt").write_text(" ".join(f"a{name}={name}" for name in names))


def prompts(number: int, length: int) -> list[str]:
    """Of that many tokens each: a character is a token of the workbench's tokenizer."""
    text = "the quick brown fox jumps over it " * (length // 20)
    return [f"{place:04d}{text[place % 7 :]}"[:length] for place in range(number)]


async def ask(client: httpx.AsyncClient, model: str, prompt: str, new: int) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True}
    start, times = time.perf_counter(), []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return Answer(times[0] - start, times[-1] - times[0])


def logprobs(url: str, model: str, prompt: str, new: int) -> list[float]:
    """Of a greedy answer's tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).raise_for_status()
    return response.json()["choices"][0]["logprobs"]["token_logprobs"]


def num_same(urls: list[str], models: list[str], asked: list[str], new: int) -> int:
    """How many answers two servers agree on."""
    pairs = [[logprobs(url, model, text, new) for url in urls] for model, text in zip(models, asked, strict=True)]
    return sum(all(abs(a - b) < TOLERANCE for a, b in zip(*pair, strict=True)) for pair in pairs)


async def one_round(url: str, models: list[str], asked: list[str], new: int) -> tuple[float, list[Answer]]:
    """Seconds until all were answered."""
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=httpx.Limits(max_connections=256)) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, *pair, new) for pair in zip(models, asked, strict=True)))
        return time.perf_counter() - start, answers


def measure(servers: Mapping[str, str], models: list[str], given: argparse.Namespace) -> dict[str, object]:
    """Of one load. The first rounds are not counted. Raises AssertionError where answers do not agree."""
    found: dict[str, dict[str, list[float]]] = {name: {"all": [], "first": [], "token": []} for name in servers}
    asked = prompts(len(models), given.length)
    ours, *others = servers
    same = {name: num_same([servers[ours], servers[name]], models, asked, given.new) for name in others}
    assert all(number > len(models) / 2 for number in same.values()), f"of {len(models)} answers agree {same}"
    for number in range(-WARMUP, given.rounds):
        for name, url in servers.items():
            took, answers = asyncio.run(one_round(url, models, [f"{number} {text}" for text in asked], given.new))
            if number >= 0:
                found[name]["all"].append(took)
                found[name]["first"].append(statistics.median(answer.first for answer in answers))
                found[name]["token"].append(statistics.median(answer.rest for answer in answers) / (given.new - 1))
    per_second = {n: summary([len(models) * given.new / s for s in own["all"]]) for n, own in found.items()}
    over = {name: {of: ratios(found[name][of], found[ours][of]) for of in found[ours]} for name in others}
    return {"same_answers": same, "tokens_per_second": per_second, "times_ours": over}


def loads(number: int) -> Loads:
    return {
        "base": ["base"] * number,
        "one adapter": ["a0"] * number,
        f"{ADAPTERS} adapters": [f"a{place % ADAPTERS}" for place in range(number)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One server beside another")
    parser.add_argument("--make", type=Path)
    parser.add_argument("--servers", nargs="+", default=[], help="NAME=URL each, ours first")
    sizes = {"hidden": 768, "layers": 4, "requests": 16, "length": 40, "new": 32, "rounds": 12}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--note", default="", help="of the other server: its version, how it runs")
    given = parser.parse_args()
    if given.make is not None:
        make(given.make, given.hidden, given.layers)
    servers = dict(server.split("=", 1) for server in given.servers)
    for load, models in loads(given.requests).items() if servers else ():
        row = {name: getattr(given, name) for name in sizes} | {"load": load, "note": given.note}
        row |= measure(servers, models, given)
        write("serving_beside", row)
        print(json.dumps({"load": load, "same": row["same_answers"], "times_ours": row["times_ours"]}), flush=True)


if __name__ == "__main__":
    main()
