"""The tables of docs/kernels.md."""

from collections import defaultdict
from collections.abc import Callable

from benchmarks.table_parts import Row, by_contestant, cell, device, grouped, newest, section


def layers(row: Row) -> str:
    return "1 layer" if row["layers"] == 1 else f"{row['layers']} layers"


def layer(rows: list[Row]) -> str:
    rows = [{"routing": "uniform", **row} for row in rows]
    kept = newest(rows, "dtype", "ExRxK", "routing", "timed", "TxDxO").values()
    parts = []
    for title, own in grouped(kept, _layer_title).items():
        own.sort(key=lambda row: [-int(size) for size in row["TxDxO"].split("x")])
        columns = {}
        for row in own:
            num_tokens, num_in, num_out = row["TxDxO"].split("x")
            floor = {"floor": cell(row["floor_times_base"])} if "floor_times_base" in row else {}
            base = {"base, ms": f"{row['base_microseconds']['median'] / 1e3:.3g}"}
            ratios = {name: cell(ratio) for name, ratio in row["times_base"].items()}
            columns[f"T={num_tokens}, {num_in} to {num_out}"] = base | floor | ratios
        parts.append(section(title, by_contestant(columns), own))
    return "\n\n".join(parts)


def _layer_title(row: Row) -> str:
    num_experts, rank, top_k = row["ExRxK"].split("x")
    routing = "" if row["routing"] == "uniform" else f", routing {row['routing']}"
    return (
        f"{row['timed'].capitalize()}, {num_experts} experts of rank {rank}, top {top_k}{routing}, {row['dtype']}, "
        f"{device(row)}, over the base:"
    )


def stack(rows: list[Row]) -> str:
    sizes = ("dtype", "hidden", "inner", "layers", "tokens", "experts", "rank", "top_k")
    parts = []
    for title, own in grouped(newest(rows, *sizes, "timed").values(), _stack_title).items():
        columns: dict[str, dict[str, str]] = {}
        for row in sorted(own, key=lambda row: len(row["timed"]) if row["timed"] != "training" else 0):
            columns[row["timed"]] = {"base": "1", **{name: cell(ratio) for name, ratio in row["times_base"].items()}}
            speeds = row["tokens_per_second"].items()
            columns[f"tokens/s, {row['timed']}"] = {name: f"{speed['median']:.4g}" for name, speed in speeds}
            if "peak_gib" in row:
                columns["peak GiB"] = {name: f"{peak:.2f}" for name, peak in row["peak_gib"].items()}
        parts.append(section(title, by_contestant(columns), own))
    return "\n\n".join(parts)


def _stack_title(row: Row) -> str:
    return (
        f"{layers(row)} of {row['hidden']} to {row['inner']}, {row['tokens']} tokens, {row['experts']} "
        f"experts of rank {row['rank']}, top {row['top_k']}, {row['dtype']}, {device(row)}, over the base:"
    )


def mixture_ffn(rows: list[Row]) -> str:
    kept = newest(rows, "dtype", "num_tokens", "hidden", "inner", "num_experts", "rank", "top_k").values()
    columns: dict[str, dict[str, str]] = {}
    for row in sorted(kept, key=lambda row: row["hidden"]):
        name = f"T={row['num_tokens']}, {row['hidden']} to {row['inner']}, rank {row['rank']}, {row['dtype']}"
        cells = {f"{way}: multiplications": cell(ratio) for way, ratio in row["flops"].items()}
        over = {key: ratio for key, ratio in row.items() if "_over_" in key and not key.endswith("_over_base")}
        columns[f"{name}, {device(row)}"] = cells | {key.replace("_", " "): cell(over[key]) for key in sorted(over)}
    return section("Their time over ours, forward and backward:", by_contestant(columns), kept)


def training_step(rows: list[Row]) -> str:
    kept = newest(rows, "dtype", "hidden", "inner", "layers", "tokens", "experts", "rank", "top_k").values()
    columns: dict[str, dict[str, str]] = {}
    for row in sorted(kept, key=lambda row: row["hidden"]):
        sizes = f"{layers(row)} of {row['hidden']} to {row['inner']}, {row['tokens']} tokens"
        over = {
            f"{way} over {ours}": cell(ratio)
            for way in ("textbook", "shared")
            for ours, ratio in row[f"{way}_over"].items()
        }
        base = {f"{name} over base": cell(ratio) for name, ratio in row["times_base"].items()}
        columns[f"{sizes}, rank {row['rank']}, {row['dtype']}, {device(row)}"] = over | base
    return section("Whole steps, the optimizer too:", by_contestant(columns), kept)


def memory(rows: list[Row]) -> str:
    parts = []
    sizes = ("dtype", "hidden", "inner", "layers", "tokens", "dropout")
    for title, own in grouped(newest(rows, *sizes, "preset", "checkpointing").values(), _memory_title).items():
        columns: dict[str, dict[str, str]] = defaultdict(dict)
        for row in own:
            way = "checkpointed" if row["checkpointing"] else "kept"
            for name, ratio in row["times_lora"].items():
                if name != "lora, C":
                    found = f"{ratio:.3f} ({row['step_times_lora'][name]:.3f})"
                    columns[f"{name.removeprefix('molex, ')}, activations {way}"][row["preset"]] = found
        parts.append(section(title, by_contestant(columns), own))
    return "\n\n".join(parts)


def _memory_title(row: Row) -> str:
    dropout = f", dropout {row['dropout']}" if row["dropout"] else ""
    how = device(row) if row.get("device") == "cuda" else "counted"
    return (
        f"{layers(row)} of {row['hidden']} to {row['inner']}, {row['tokens']} tokens, {row['dtype']}"
        f"{dropout}, {how}; the peak over PEFT's LoRA's (of the step alone, without weights and moments):"
    )


def launches(rows: list[Row]) -> str:
    parts = []
    for title, own in grouped(newest(rows, "dtype").values(), lambda row: f"{row['dtype']}, {device(row)}:").items():
        (row,) = own
        kinds = ("operators", "kernels", "waits")
        columns = {kind: {name: str(count) for name, count in row[kind].items()} for kind in kinds if kind in row}
        parts.append(section(title, by_contestant(columns), own))
    return "\n\n".join(parts)


def experts_alone(rows: list[Row]) -> str:
    kept = newest(rows, "dtype", "num_tokens", "num_in", "num_out", "num_experts", "rank", "top_k").values()
    columns = {
        f"T={row['num_tokens']}, {row['num_in']} to {row['num_out']}, rank {row['rank']}, {row['dtype']}": {
            key.replace("_", " "): cell(ratio) for key, ratio in row.items() if "_over_" in key
        }
        for row in kept
    }
    return section("Times over, forward and backward:", by_contestant(columns), kept)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "layer": layer,
    "stack": stack,
    "mixture_ffn": mixture_ffn,
    "training_step": training_step,
    "memory": memory,
    "launches": launches,
    "expert_loop": experts_alone,
    "mixture_linear": experts_alone,
}
