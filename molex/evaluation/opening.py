"""What an evaluation is given, a live model or a folder, opened: the model, and the tokenizer that goes with it."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from molex.errors import CheckpointError, ConfigError
from molex.io.loading import load
from molex.io.record import CONFIG_FILE
from molex.mixture import Mixture

Subject = PreTrainedModel | Mixture | str | Path  # a path: a mixture's folder, a checkpoint's, or a checkpoint's hub id


def open_model(subject: Subject, device: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """The model itself, or the one a path names, loaded to `device` (by default a GPU if there is one). dtype: of a
    checkpoint, by its name in torch, "auto" = as it was saved.

    Raises CheckpointError where the path holds no model, ConfigError on anything that is neither.
    """
    model = subject.model if isinstance(subject, Mixture) else subject
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, str | Path):
        raise ConfigError(f"{type(model).__name__} is no transformers model; give one, a mixture, or a folder")
    folder = Path(model)
    if (folder / CONFIG_FILE).is_file():
        opened = load(folder).model
        assert isinstance(opened, PreTrainedModel)
    elif (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter; molex.from_peft makes a mixture of it and others")
    else:
        opened = _load_checkpoint(str(model), dtype)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return cast(Any, opened).to(place)


def _load_checkpoint(name: str, dtype: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name} is no model that can be loaded ({reason}); give the folder of one") from error


def open_tokenizer(
    given: PreTrainedTokenizerBase | str | Path | None, model: PreTrainedModel, subject: Subject
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one in the subject's folder, or the one of the base it was made on.

    Raises CheckpointError where none of these has one.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    own = [subject] if isinstance(subject, str | Path) else []
    places = [*own, model.config.name_or_path] if given is None else [given]
    tried = []
    for place in filter(None, map(str, places)):
        if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")):
            tried.append(f"{place} has none")  # transformers would make up an empty one from the model's type
            continue
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            tried.append(f"{place}: {str(error).splitlines()[0]}")
    raise CheckpointError(f"no tokenizer ({'; '.join(tried) or 'the model was made in memory'}); pass tokenizer=")
