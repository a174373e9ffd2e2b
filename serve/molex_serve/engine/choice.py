"""The engine for a model: continuous batching where it can run it, one request at a time elsewhere."""

import logging

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex.errors import BackendError
from molex_serve.engine.base import Engine
from molex_serve.engine.common import BeginStep
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.engine.static import StaticEngine
from molex_serve.engine.upstream import require_tested
from molex_serve.settings import EngineSettings

logger = logging.getLogger("molex")


def engine_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings, begin_step: BeginStep
) -> Engine:
    """Raises BackendError for a transformers that continuous batching is not tested with: that is nothing to be slow
    over in silence."""
    require_tested(transformers.__version__)
    try:
        return ContinuousEngine(model, tokenizer, settings, begin_step)
    except BackendError as error:
        logger.warning("%s", error)
        return StaticEngine(model, tokenizer, settings, begin_step)
