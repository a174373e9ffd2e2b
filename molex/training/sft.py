"""MixtureSFTTrainer: TRL's SFTTrainer for mixtures, with task ids that survive its preparation and its packing."""

import copy
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from molex.training.arguments import MixtureArguments
from molex.training.mixin import MixtureTrainerMixin
from molex.training.tasks import TASKS, per_token

AnyDataset = Dataset | IterableDataset


@dataclass
class MixtureSFTConfig(MixtureArguments, SFTConfig):
    """SFTConfig of a mixture."""


class MixtureSFTTrainer(MixtureTrainerMixin, SFTTrainer):
    """Used as SFTTrainer is; args may be MixtureSFTConfig, data sets may have a `task_ids` column."""

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> AnyDataset:
        if TASKS not in get_dataset_column_names(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        if packing:
            whole.max_length = None  # packing cuts to length itself
        prepared = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        workers: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(prepared, Dataset) else {}
        if not packing:
            return prepared.map(_cut_tasks, fn_kwargs={"keep_end": args.truncation_mode == "keep_end"}, **workers)
        rows = prepared.map(_spread_tasks, **workers).select_columns(["input_ids", "labels", TASKS])
        packed = pack_dataset(rows, args.max_length, args.packing_strategy, workers)  # type: ignore[type-var, arg-type]
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed


def _spread_tasks(row: dict[str, Any]) -> dict[str, Any]:
    return {TASKS: per_token(row[TASKS], len(row["input_ids"])).tolist()}


def _cut_tasks(row: dict[str, Any], keep_end: bool) -> dict[str, Any]:
    tasks, length = row[TASKS], len(row["input_ids"])
    if isinstance(tasks, int):
        return {TASKS: tasks}
    return {TASKS: tasks[-length:] if keep_end else tasks[:length]}
