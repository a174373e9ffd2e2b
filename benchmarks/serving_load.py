"""Serving with N adapters against the base alone: latency and throughput of the same requests on the same engine.

    python -m benchmarks.serving_load [--kind lora|esft] [--adapters 0,1,5,20,100] [--alpha 1] [--load 0.5]
    python -m benchmarks.serving_load --device cuda --dtype bfloat16 --hidden 2048 --adapters 0,20

base     the model as it is, on an engine of its own: no part of molex_serve's model has touched it
served   N adapters resident, and the requests are theirs

Each round replays one trace on both, in a random order. In the closed loop `--batch` requests come at once and the
adapters take turns; in the open one they come as Poisson arrivals at a `--load` of what the base can do in the closed
one, shared among adapters by a power law (`serving_trace.py`). Ratios are served over base, round by round: of the time
to the first token, between tokens, to the end of all, and of the process' CPU time. Beside them, how many different
adapters a step had and experts a layer read, counted in a replay that is not timed. What the adapters say is compared
with merged models first.
"""

import argparse
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.harness import ratios, summary, write
from benchmarks.serving_bases import KINDS, REPLACED, VOCABULARY
from benchmarks.serving_trace import Arrival, Shape, at_once, poisson
from benchmarks.serving_ways import Way, attach, check, counted, running
from molex_serve.model.served import ServedModel
from molex_serve.settings import AdapterLimits, EngineSettings

SIZES = {"layers": 2, "rank": 16, "batch": 32, "prompt": 32, "new": 10, "requests": 12, "rounds": 10}
SIZES |= {"step_tokens": 256, "threads": 2}
FIXED = ("kind", "device", "dtype", "hidden", *(name for name in SIZES if name != "threads"))
MEASURES = ("ttft", "tpot", "whole", "cpu")


def measure(ways: Mapping[str, Way], trace: Sequence[Arrival], rounds: int) -> dict[str, dict[str, list[float]]]:
    """way -> measure -> each round's value; one round before them is not kept."""
    names, shuffle = [*ways], random.Random(0).shuffle
    found: dict[str, dict[str, list[float]]] = {name: {measure: [] for measure in MEASURES} for name in names}
    for number in range(rounds + 1):
        shuffle(names)
        for name in names:
            start = time.process_time()
            replayed = ways[name].replay(trace)
            values = (replayed.first, replayed.next, replayed.whole, time.process_time() - start)
            for own, value in zip(found[name].values(), values, strict=True):
                own += [value] if number else []
    return found


def row_of(ways: Mapping[str, Way], trace: Sequence[Arrival], rounds: int) -> dict[str, Any]:
    found = measure(ways, trace, rounds)
    adapters, experts = counted(ways["served"], trace)
    base, served = found["base"], found["served"]
    num_tokens = sum(arrival.new for arrival in trace)
    row: dict[str, Any] = {
        "served_over_base": {measure: ratios(served[measure], base[measure]) for measure in MEASURES},
        "milliseconds": {
            name: {measure: summary([1e3 * t for t in own[measure]]) for measure in MEASURES}
            for name, own in found.items()
        },
        "tokens_per_second": {name: round(num_tokens / median(own["whole"]), 1) for name, own in found.items()},
        "step_adapters": round(adapters, 2),
    }
    if experts:
        row["step_experts"] = {"base": round(counted(ways["base"], trace)[1], 2), "served": round(experts, 2)}
    return row


def settings_of(arguments: argparse.Namespace, most: int) -> EngineSettings:
    """Prefixes are not kept: every replay of a trace computes all of it."""
    requests = max(arguments.batch, arguments.requests)
    return EngineSettings(
        cache_tokens=requests * (arguments.prompt + arguments.new + 16),
        step_tokens=arguments.step_tokens,
        step_requests=requests,
        step_adapters=max(most, 1),
        prefix_cache=False,
    )


def limits_of(arguments: argparse.Namespace, most: int) -> AdapterLimits:
    columns = max(most, 1) * max(arguments.rank, 8)
    slots = most * REPLACED if arguments.kind == "esft" else 0
    return AdapterLimits(resident=max(most, 1), columns=columns, expert_slots=slots)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serving with adapters against the base on the same engine")
    parser.add_argument("--kind", choices=[*KINDS], default="lora")
    parser.add_argument("--hidden", type=int, help="of the base; each kind has its usual one")
    parser.add_argument("--adapters", default="0,1,5,20,100")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the adapters' shares; 1 = alike")
    parser.add_argument("--load", type=float, default=0.5, help="0 leaves the open loop out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    arguments.hidden = arguments.hidden or KINDS[arguments.kind].hidden
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    numbers = [int(number) for number in arguments.adapters.split(",")]
    kind, shape = KINDS[arguments.kind], Shape(prompt=arguments.prompt, new=arguments.new, vocabulary=VOCABULARY)
    dtype = getattr(torch, arguments.dtype)

    def make() -> PreTrainedModel:
        return kind.base(arguments.hidden, arguments.layers).to(arguments.device, dtype)

    plain = make()
    with TemporaryDirectory() as folder:
        folders = kind.save(plain, Path(folder), max(numbers), arguments.rank)
        served = ServedModel(make(), limits_of(arguments, max(numbers)))
        fixed = {name: getattr(arguments, name) for name in FIXED}
        with running(make(), served, settings_of(arguments, max(numbers))) as ways:
            for number in sorted(numbers):
                attach(ways["served"], served, folders[:number])
                trace = at_once(arguments.batch, number, shape, seed=number)
                check(kind, plain, folders[:number], trace, ways["served"].replay(trace))
                closed = row_of(ways, trace, arguments.rounds)
                report({**fixed, "loop": "closed", "adapters": number, **closed})
                if arguments.load:
                    rate = arguments.load * arguments.batch / closed["milliseconds"]["base"]["whole"]["median"] * 1e3
                    trace = poisson(arguments.requests, rate, number, arguments.alpha, shape, seed=number)
                    more = {"alpha": arguments.alpha, "load": arguments.load, "requests_per_second": round(rate, 2)}
                    opened = row_of(ways, trace, arguments.rounds)
                    report({**fixed, "loop": "open", "adapters": number, **more, **opened})


def report(row: Mapping[str, Any]) -> None:
    write("serving_load", row)
    print(json.dumps({measure: ratio["median"] for measure, ratio in row["served_over_base"].items()}), flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
