"""The tables of docs/serving_performance.md."""

from collections import defaultdict
from collections.abc import Callable

from benchmarks.table_parts import Row, by_contestant, cell, device, grouped, newest, section, table

KINDS = {"lora": "LoRAs over a dense base", "esft": "Expert swaps over a mixture-of-experts base"}
MEASURES = {"ttft": "first token", "tpot": "between tokens", "whole": "all", "cpu": "CPU time"}


def load(rows: list[Row]) -> str:
    """Latency and throughput over the base's."""
    sizes = ("kind", "loop", "dtype", "hidden", "layers", "rank", "batch", "requests", "prompt", "new")
    kept = newest(rows, *sizes, "alpha", "load", "adapters").values()
    parts = []
    for title, own in grouped(kept, _load_title).items():
        own.sort(key=lambda row: row["adapters"])
        experts = ["experts a layer reads, base", "served"] if "step_experts" in own[0] else []
        header = ["adapters", "in a step", *experts, *MEASURES.values(), "tokens/s, base", "served"]
        parts.append(section(title, table(header, map(_load_line, own)), own))
    return "\n\n".join(parts)


def _load_title(row: Row) -> str:
    sizes = f"{row['layers']} layers of {row['hidden']}, {row['prompt']} tokens and {row['new']} new ones"
    if row["loop"] == "closed":
        loop = f"{row['batch']} at once"
    else:
        loop = f"{row['requests']} as they arrive, at {row['load']} of what the base can do, alpha {row['alpha']}"
    return f"{KINDS[row['kind']]}, {sizes}, {loop}, {row['dtype']}, {device(row)}, times over the base's:"


def _load_line(row: Row) -> list[str]:
    experts = row.get("step_experts", {})
    return [
        str(row["adapters"]),
        f"{row['step_adapters']:.1f}",
        *(f"{experts[name]:.1f}" for name in experts),
        *(cell(row["served_over_base"][measure]) for measure in MEASURES),
        *(f"{row['tokens_per_second'][name]:.4g}" for name in ("base", "served")),
    ]


def mixed(rows: list[Row]) -> str:
    """Other ways to compute a batch in which every row has another adapter."""
    kept = newest(rows, "dtype", "timed", "layers", "adapters", "rank", "length", "hidden").values()
    parts = []
    for title, own in grouped(kept, _mixed_title).items():
        columns = {}
        for row in sorted(own, key=lambda row: row["hidden"]):
            times = {name: cell(ratio) for name, ratio in row["times_served"].items() if name != "base"}
            columns[f"hidden {row['hidden']}"] = times | {"served over base": cell(row["served_over_base"])}
        parts.append(section(title, by_contestant(columns), own))
    return "\n\n".join(parts)


def _mixed_title(row: Row) -> str:
    tokens = "one token a row" if row["timed"] == "decoding" else f"{row['length']} tokens a row"
    return (
        f"{row['timed'].capitalize()}, {tokens}, {row['adapters']} rows with a LoRA of rank {row['rank']} each, "
        f"{row['layers']} layers, {row['dtype']}, {device(row)}; times over ours:"
    )


def experts(rows: list[Row]) -> str:
    """Rerouting, and what different experts cost."""
    kept = newest(rows, "dtype", "hidden", "inner", "experts", "top_k", "tuned", "adapters", "tokens").values()
    parts = []
    for title, own in grouped(kept, _experts_title).items():
        own.sort(key=lambda row: (row["adapters"], row["tokens"]))
        header = ["adapters", "tokens", "experts read, base", "served", "served over base", "rerouting, % of the layer"]
        parts.append(section(title, table(header, map(_experts_line, own)), own))
    return "\n\n".join(parts)


def _experts_title(row: Row) -> str:
    return (
        f"{row['experts']} experts of {row['hidden']} by {row['inner']}, top {row['top_k']}, {row['tuned']} replaced "
        f"by each adapter, {row['dtype']}, {device(row)}:"
    )


def _experts_line(row: Row) -> list[str]:
    distinct = [str(row["distinct"][name]) for name in ("base", "served")]
    share = {name: 100 * value for name, value in row["reroute_share"].items()}
    return [str(row["adapters"]), str(row["tokens"]), *distinct, cell(row["served_over_base"]), cell(share)]


def registered(rows: list[Row]) -> str:
    """Memory of many registered adapters."""
    kept = [*newest(rows, "registered", "resident", "hidden", "layers", "rank", "host_mib", "asks").values()]
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    for row in kept:
        name = f"{row['registered']} LoRAs of rank {row['rank']}, {row['resident']} places, {row['hidden']} wide"
        cells = {f"grown by, {when}": mib for when, mib in row["mib"].items()} | row["mib_of"]
        merged = row["merged_mib"]["each"]
        cells |= {"a merged model": merged, f"{row['registered']} merged models": merged * row["registered"]}
        columns[f"MiB, {name}"] = {name: f"{size:.1f}" for name, size in cells.items()}
    return section("Resident memory of the process, and what of it is whose:", by_contestant(columns), kept)


def memory(rows: list[Row]) -> str:
    """ExpertWeave's figures by arithmetic, and small experts measured."""
    kept = [*newest(rows, "hidden", "inner").values()]
    row = kept[-1]
    lines = [
        [num, *(f"{row['tokens'][num][way]:,}" for way in ("slots", "padded", "merged")), _paper(row, num)]
        for num in row["tokens"]
    ]
    header = ["adapters", "tokens of cache beside slots", "beside padded places", "beside merged models", "the paper's"]
    measured = {name.replace("_", ", "): f"{size:.2f}" for name, size in row["mib"].items()}
    return "\n\n".join(
        [
            table(header, lines),
            section("Small experts of three such adapters, MiB:", table([*measured], [[*measured.values()]]), kept),
        ]
    )


def _paper(row: Row, num: str) -> str:
    found = row["paper_tokens"].get(num)
    return "" if found is None else f"{found:,}"


def beside(rows: list[Row]) -> str:
    """Whole servers."""
    kept = newest(rows, "hidden", "layers", "requests", "length", "new", "note", "load").values()
    parts = []
    for title, own in grouped(kept, _beside_title).items():
        columns: dict[str, dict[str, str]] = defaultdict(dict)
        for row in own:
            for name, times in row["times_ours"].items():
                for of, measure in {"all": "until all are done", "first": "first token", "token": "between"}.items():
                    columns[f"{name}, {measure}"][row["load"]] = cell(times[of])
        parts.append(section(title, by_contestant(columns), own))
    return "\n\n".join(parts)


def _beside_title(row: Row) -> str:
    return (
        f"{row['requests']} requests of {row['length']} tokens and {row['new']} new ones, {row['layers']} layers of "
        f"{row['hidden']}{row['note'] and ', '}{row['note']}; times over ours:"
    )


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "serving_load": load,
    "serving_mixed": mixed,
    "serving_experts": experts,
    "serving_registered": registered,
    "serving_memory": memory,
    "serving_beside": beside,
}
