"""Instruction tuning of a mixture: any causal model, data in any known format, any method, one process or many.

    python recipes/instruction_tuning.py --config recipes/configs/mixlora.yaml
    python recipes/instruction_tuning.py --config recipes/configs/mola.yaml --set top_k=1 rank=4 --max_steps 100
    torchrun --nproc_per_node 8 recipes/instruction_tuning.py --config recipes/configs/mixlora_zero3.yaml

A YAML file holds the same names as the flags, and flags win. Besides the fields below there are all of TRL's SFTConfig
(packing, assistant_only_loss, max_length, bf16, deepspeed, ...). The output folder gets the mixture, the tokenizer and
`run.yaml`, which runs the same again, and `trainer_state.json` with everything that was logged.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl.data_utils import maybe_convert_to_chatml
from trl.scripts.utils import TrlParser

import molex
from molex import workbench
from molex.errors import ConfigError
from molex.training import MixtureSFTConfig, MixtureSFTTrainer
from molex.training.data import supervised
from molex.training.tasks import TASKS

logger = logging.getLogger("molex")
Row = dict[str, Any]


@dataclass
class MixtureSettings:
    """The model and what it becomes."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a causal model; by default the workbench's small base."}
    )
    dtype: str = field(default="auto", metadata={"help": "The base's dtype; experts and routers are float32."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})
    preset: str = field(default="mixlora", metadata={"help": "The method; `molex methods` lists them."})
    settings: dict[str, Any] | None = field(
        default=None, metadata={"help": "The preset's settings, a mapping in the YAML file."}
    )
    set: list[str] = field(default_factory=list, metadata={"help": "The same as flags: --set top_k=1 rank=8."})


@dataclass
class DataSettings:
    """What it learns from. The format (alpaca, messages, prompt-completion, text) is detected by the columns."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder, or a json, jsonl, csv or parquet file; by default skills."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The hub data set's configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Slices work: train[:95%]."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; by default there is no evaluation."}
    )
    format: str | None = field(default=None, metadata={"help": "The data's format, where columns mislead."})
    skills: list[str] = field(
        default_factory=lambda: ["upper", "ends", "triple"], metadata={"help": "Workbench skills to learn."}
    )
    skill_rows: int = field(default=4000, metadata={"help": "How many rows of skills; a tenth more to evaluate on."})


@dataclass
class TrainingSettings(MixtureSFTConfig):
    """How it learns: SFTConfig with a mixture's own fields. TRL's default, bf16 always, fails on CPUs."""

    bf16: bool = field(default=is_torch_bf16_gpu_available(), metadata={"help": "By default where the GPU can."})


def main() -> None:
    """Load, convert, train, evaluate, save, show."""
    mixed, data, training = read_arguments()
    set_seed(training.seed)
    tokenizer = load_tokenizer(mixed)
    train_rows, eval_rows = load_data(data, chat=tokenizer.chat_template is not None)
    mixture = molex.convert(load_model(mixed), mixture_config(mixed))
    trainer = MixtureSFTTrainer(
        mixture.model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = trainer.evaluate() if eval_rows is not None else trainer.state.log_history[-1]
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_run(mixed, data, training)
    example = generate_example(trainer, tokenizer, dict(next(iter(train_rows if eval_rows is None else eval_rows))))
    if trainer.is_world_process_zero():
        report(mixture, metrics, example, training.output_dir)
    leave_together()


def leave_together() -> None:
    """A process that goes while another still talks to it makes that one abort, and torchrun report a failed run."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def read_arguments(arguments: list[str] | None = None) -> tuple[MixtureSettings, DataSettings, TrainingSettings]:
    """Flags over YAML over defaults. Raises ValueError on names that nothing has."""
    parser = TrlParser((MixtureSettings, DataSettings, TrainingSettings))  # type: ignore[arg-type]
    return parser.parse_args_and_config(arguments)  # type: ignore[return-value]


def mixture_config(mixed: MixtureSettings) -> molex.MixtureConfig:
    """The preset with its settings changed: first the YAML file's, then the flags'."""
    if not isinstance(mixed.settings or {}, dict):
        raise ConfigError(f"settings: {mixed.settings!r} is no mapping; write names and values below it")
    settings = {name: plain_value(value) for name, value in (mixed.settings or {}).items()}
    for assignment in mixed.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write name=value, such as top_k=2")
        settings[name] = plain_value(value)
    config = molex.preset(mixed.preset, **settings)
    if not config.train_experts:
        raise ConfigError(
            f"{mixed.preset} routes among pretrained adapters, and this recipe starts from none; "
            "--set train_experts=true trains experts and router together"
        )
    return config


def plain_value(value: Any) -> Any:
    """What a text stands for: JSON's numbers, booleans, lists and null, otherwise itself (YAML reads 1e-3 as text)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def load_model(mixed: MixtureSettings) -> PreTrainedModel:
    """Under ZeRO-3 it arrives partitioned: the arguments were read before."""
    if not isinstance(getattr(torch, mixed.dtype, "auto"), torch.dtype) and mixed.dtype != "auto":
        raise ConfigError(f"--dtype {mixed.dtype}: give auto, or a name such as bfloat16")
    if mixed.model_name_or_path is None:
        return workbench.load_base(torch.float32 if mixed.dtype == "auto" else getattr(torch, mixed.dtype))
    return AutoModelForCausalLM.from_pretrained(
        mixed.model_name_or_path, dtype=mixed.dtype, attn_implementation=mixed.attn_implementation
    )


def load_tokenizer(mixed: MixtureSettings) -> PreTrainedTokenizerBase:
    if mixed.model_name_or_path is None:
        return workbench.load_tokenizer()
    return AutoTokenizer.from_pretrained(mixed.model_name_or_path)


def load_data(data: DataSettings, chat: bool) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on, and rows to evaluate on if there are any."""
    if data.dataset_name is None:
        parts = [
            datasets.Dataset.from_list(workbench.dataset(data.skills, split, size))
            for split, size in (("train", data.skill_rows), ("validation", max(data.skill_rows // 10, 1)))
        ]
    else:
        splits = [split for split in (data.dataset_train_split, data.dataset_test_split) if split]
        parts = [load_split(data, split) for split in splits]
    train_rows, eval_rows = (*(supervised(part, data.format, chat=chat) for part in parts), None)[:2]
    return train_rows, eval_rows  # type: ignore[return-value]


def load_split(data: DataSettings, split: str) -> datasets.Dataset:
    """One split of a file on disk, or of a folder or hub data set."""
    path = Path(str(data.dataset_name))
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind is not None and not path.exists():
        raise ConfigError(f"{path} is not there; give a file, a folder or a hub id")
    if path.is_file():
        if kind is None:
            raise ConfigError(f"{path} is none of .json, .jsonl, .csv, .parquet")
        return datasets.load_dataset(kind, data_files=str(path), split=split)
    return datasets.load_dataset(str(data.dataset_name), data.dataset_config, split=split)


@torch.no_grad()
def generate_example(trainer: MixtureSFTTrainer, tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, str]:
    """A prompt of the data and the greedy answer to it. Every process takes part, where parameters are sharded."""
    prompt_ids = prompt_of(row, tokenizer).to(trainer.args.device)
    model = trainer.mixture.model.eval()
    tasks = [row[TASKS]] if isinstance(row.get(TASKS), int) else None
    with trainer.mixture.using(tasks=tasks):
        ids = model.generate(  # type: ignore[operator]
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=64, do_sample=False
        )[0]
    length = prompt_ids.shape[1]
    return str(tokenizer.decode(ids[:length])), str(tokenizer.decode(ids[length:], skip_special_tokens=True))


def prompt_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids (1, S) of what comes before a row's last answer, or of the first half of a plain text."""
    row = maybe_convert_to_chatml(dict(row))
    messages = (row["messages"][:-1] or row["messages"]) if "messages" in row else row.get("prompt")
    if isinstance(messages, list):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, tools=row.get("tools")
        )
        return ids["input_ids"]  # type: ignore[return-value, index]
    text = messages if messages is not None else row["text"][: len(row["text"]) // 2]
    return tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[return-value]


def write_run(mixed: MixtureSettings, data: DataSettings, training: TrainingSettings) -> None:
    """Every setting as it was resolved; `--config run.yaml` reads it."""
    known = {f for f in training.__dataclass_fields__ if training.__dataclass_fields__[f].init}
    resolved = {name: value for name, value in training.to_dict().items() if name in known}
    secrets = ("hub_token", "push_to_hub_token")
    chosen = {**asdict(mixed), **asdict(data), **{name: v for name, v in resolved.items() if name not in secrets}}
    stated = {name: value for name, value in chosen.items() if value is not None}
    (Path(str(training.output_dir)) / "run.yaml").write_text(yaml.safe_dump(stated, sort_keys=False))


def report(mixture: molex.Mixture, metrics: Row, example: tuple[str, str], folder: str | None) -> None:
    """What was trained, how well, what it says, where it is."""
    console = Console()
    parts = Table("part", "value", title=f"{mixture.config.method}: parameters")
    for name, value in mixture.num_parameters().items():
        parts.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    numbers = Table("metric", "value", title="last metrics")
    for name, value in metrics.items():
        numbers.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(parts, numbers)
    console.print("prompt:", repr(example[0]), markup=False)
    console.print("answer:", repr(example[1]), markup=False)
    console.print(f"the mixture is in {folder}; molex.load({folder!r}) loads it with its base", markup=False)


if __name__ == "__main__":
    main()
