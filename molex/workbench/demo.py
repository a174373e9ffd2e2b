"""`molex demo`: a small dense model becomes mixtures by every method, on the workbench, without a network.

1. lora, mixlora and mola learn several skills at once; exact match on held-out questions, before and after.
2. One LoRA for each skill is trained side by side (LoRA-Mixer's hard stage), and becomes the experts of the presets
   that route over adapters.
3. Every other preset is converted, trained a few steps, saved, reloaded from disk and generated with.

Tables, loss curves, a routing heat map and the saved mixtures are written to the output folder.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from molex.errors import ConfigError, StateError
from molex.evaluation.figures import check_plots
from molex.evaluation.heat_map import routing_by_label, routing_heat_map
from molex.io.loading import load
from molex.library import Factors
from molex.mixture import Mixture
from molex.presets import presets
from molex.routers.staged import StagedRouter
from molex.surgery import convert
from molex.workbench.data import collate, dataset, question_and_answer
from molex.workbench.model import load_base
from molex.workbench.plots import loss_curves
from molex.workbench.scoring import answers, exact_match_by_skill
from molex.workbench.settings import OVER_ADAPTERS, task_types, workbench_preset
from molex.workbench.tokenizer import load_tokenizer
from molex.workbench.training import Run, fit

SKILLS = ("upper", "triple", "inner", "ends")
COMPARED = ("lora", "mixlora", "mola")


@dataclass
class Result:
    """What one preset did. `exact` by skill is empty where training was too short to mean anything."""

    preset: str
    parameters: dict[str, int]
    losses: list[float]
    seconds: float
    exact: dict[str, float] = field(default_factory=dict)
    answer: str = ""
    reloaded: bool = False


class Demo:
    """The parts of the demo, in order."""

    def __init__(self, out: Path, console: Console, steps: int):
        self.out, self.console, self.steps = out, console, steps
        self.tokenizer = load_tokenizer()
        self.held_out = dataset(SKILLS, "test", 64 * len(SKILLS))
        self.results: list[Result] = []
        self.experts: dict[str, Factors] = {}

    def run(self) -> list[Result]:
        """All of it; returns one result for each preset."""
        base = exact_match_by_skill(load_base().eval(), self.tokenizer, self.held_out)
        for name in COMPARED:
            mixture, result = self._train(name, self.steps)
            result.exact = exact_match_by_skill(mixture.model, self.tokenizer, self.held_out)
            if name == "mixlora":
                self._draw_routing(mixture)
            self._finish(mixture, result)
        self.console.print(_score_table(base, self.results))
        self._train_experts()
        for name in presets:
            if name not in COMPARED and name != "lora-mixer":
                self._finish(*self._train(name, max(2, self.steps // 10)))
        self.console.print(_method_table(self.results))
        self._write(base)
        return self.results

    def _train(self, name: str, steps: int) -> tuple[Mixture, Result]:
        """Converts a fresh base by a preset and trains it on all skills at once."""
        torch.manual_seed(0)
        mixture = convert(load_base(), workbench_preset(name, len(SKILLS)))
        for expert_id, (skill, factors) in enumerate(self.experts.items() if name in OVER_ADAPTERS else ()):
            mixture.load_expert(expert_id, skill, factors)
        return mixture, self._fit(mixture, name, steps)

    def _fit(self, mixture: Mixture, label: str, steps: int) -> Result:
        method, started, losses = mixture.config.method, time.monotonic(), []
        if mixture.trainable_parameters():
            run = Run(steps=steps, task_types=task_types(method))
            rows = dataset(SKILLS, "train", steps * run.batch_size)
            with _progress(self.console) as progress:
                bar = progress.add_task(label, total=steps, loss="")
                tell = lambda _, loss: progress.update(bar, advance=1, loss=f"loss {loss:.3f}")  # noqa: E731
                losses = fit(mixture, self.tokenizer, rows, run, tell)
        mixture.model.eval()
        return Result(label, mixture.num_parameters(), losses, time.monotonic() - started)

    def _train_experts(self) -> None:
        """LoRA-Mixer's hard stage trains a LoRA for each skill side by side; its soft stage learns to mix them."""
        torch.manual_seed(0)
        mixture = convert(load_base(), workbench_preset("lora-mixer", len(SKILLS)).override({"stage": "hard"}))
        self._fit(mixture, "lora-mixer, stage 1", self.steps // 2)
        for expert_id, skill in enumerate(SKILLS):
            self.experts[skill] = mixture.factors(expert_id)
        for layer in mixture.layers.values():
            assert isinstance(layer.router, StagedRouter)
            layer.router.stage = "soft"
        result = self._fit(mixture, "lora-mixer", max(2, self.steps // 10))
        self._finish(mixture, result)

    def _finish(self, mixture: Mixture, result: Result) -> None:
        """Saves, reloads from disk, compares bit for bit, and lets the reloaded model answer one question."""
        folder = self.out / "mixtures" / result.preset
        mixture.save(folder)
        reloaded = load(folder)
        question = collate(self.held_out[:1], self.tokenizer)
        question.pop("labels")
        with torch.no_grad(), mixture.using(tasks=[0]), reloaded.using(tasks=[0]):
            logits = mixture.model(**question).logits
            result.reloaded = torch.equal(logits, reloaded.model(**question).logits)
            prompt = str(self.held_out[0]["prompt"])
            result.answer = f"{prompt.strip()} {answers(reloaded.model, self.tokenizer, [prompt], 16)[0]}"
        self.results.append(result)

    def _draw_routing(self, mixture: Mixture) -> None:
        """The share of tokens of each skill that each expert served."""
        texts = ["".join(question_and_answer(row)) for row in self.held_out]
        loads = routing_by_label(mixture, self.tokenizer, texts, [row["skill"] for row in self.held_out], "load", 64)
        title = f"{mixture.config.method}: who serves which skill"
        routing_heat_map(loads, self.out / "routing.png", measure="load", title=title)

    def _write(self, base: Mapping[str, float]) -> None:
        loss_curves({r.preset: r.losses for r in self.results if r.exact}, self.out / "losses.png")
        record = {"skills": SKILLS, "base": dict(base), "presets": [asdict(result) for result in self.results]}
        (self.out / "results.json").write_text(json.dumps(record, indent=1))
        with (self.out / "results.txt").open("w") as file:
            plain = Console(file=file, width=160)
            plain.print(_score_table(base, self.results), _method_table(self.results))


def run_demo(out: Path, console: Console, steps: int) -> list[Result]:
    """Runs the demo with `steps` training steps for the compared methods. Raises StateError if one failed to learn
    or to come back from disk, ConfigError where `out` is a file or matplotlib is not installed."""
    check_plots()
    if out.is_file():
        raise ConfigError(f"{out} is a file; give a folder to write to")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made a folder ({error.strerror}); give another one to write to") from error
    results = Demo(out, console, steps).run()
    console.print(f"Written to {out}: results.txt, results.json, losses.png, routing.png, mixtures/")
    broken = [result.preset for result in results if not result.reloaded]
    if broken:
        raise StateError(f"{', '.join(broken)}: the reloaded mixture differs from the saved one")
    return results


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)


def _score_table(base: Mapping[str, float], results: list[Result]) -> Table:
    table = Table("", *SKILLS, "mean", "trainable", "seconds", title="Exact match on held-out questions")
    table.add_row("base", *[f"{base[skill]:.2f}" for skill in SKILLS], f"{fmean(base.values()):.2f}", "", "")
    for result in results:
        if result.exact:
            scores = [*[result.exact[skill] for skill in SKILLS], fmean(result.exact.values())]
            trained = f"{result.parameters['trainable']:,}"
            table.add_row(result.preset, *[f"{s:.2f}" for s in scores], trained, f"{result.seconds:.0f}")
    return table


def _method_table(results: list[Result]) -> Table:
    table = Table(
        "preset", "stored", "trainable", "steps", "loss", "reloaded", "answer", title="Every preset: trained and back"
    )
    for result in results:
        loss = f"{result.losses[0]:.2f} → {result.losses[-1]:.2f}" if result.losses else "not trained"
        counts = [f"{result.parameters[key]:,}" for key in ("stored", "trainable")]
        same = "bit for bit" if result.reloaded else "DIFFERS"
        table.add_row(result.preset, *counts, str(len(result.losses)), loss, same, result.answer.replace("\n", " "))
    return table
