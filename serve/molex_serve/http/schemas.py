"""The bodies of OpenAI's API as they come and go, with what molex adds to them.

Fields that are not known are ignored, as other servers do; null is as good as absent; a value of a wrong kind is an
error. Of what goes out, the fields that were set are written, null or not.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 128
SEEDS = 1 << 63
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Seed = Annotated[int, Field(ge=-SEEDS, lt=SEEDS)]


def _kind_of_prompt(value: object) -> object:
    """One message in place of one for each kind that a prompt could have been."""
    if isinstance(value, str) or (isinstance(value, list) and _is_prompt(value)):
        return value
    raise PydanticCustomError("prompt", "give a text, a list of texts, a list of token ids, or a list of such lists")


def _is_prompt(items: list[object]) -> bool:
    if items and all(isinstance(item, list) for item in items):
        return all(type(token) is int for item in items if isinstance(item, list) for token in item)
    return {type(item) for item in items} in ({str}, {int})


def _joined_parts(value: object) -> object:
    """A message's content as one text. Parts of other kinds are not ignored, they would be missed."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("content", "give a text or parts of type text; images, sounds and files are not read")
    return "".join(map(str, texts))


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Prompts = Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(_kind_of_prompt)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    schema_of: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("json_schema", "type json_schema takes a json_schema with the schema in it")
        return self


class Asked(Body):
    """What completions and chats share. adapter: an alias, in place of `model` or beside the base's name. task: for
    mixtures that are routed by tasks. return_experts: each token's dominant expert comes with it."""

    model: str | None = None
    adapter: str | None = None
    task: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: Seed | None = None
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(_as_list)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = []
    ignore_eos: bool = False
    logit_bias: dict[str, float] = {}
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_experts: bool = False


class CompletionBody(Asked):
    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class Message(Body):
    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)] = ""
    tool_calls: list[Any] = []


class ChatBody(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Any] = []
    functions: list[Any] = []
    tool_choice: Any = None


class LoadBody(Body):
    alias: str
    path: str
    expected_generation: str | None = None
    pin: bool = False


class LoadLoraBody(Body):
    """As vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraBody(Body):
    lora_name: str


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenExpert(BaseModel):
    """text: what the token added to the answer. name, share: None where no expert served it."""

    text: str
    name: str | None
    share: float | None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    experts: list[TokenExpert] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class ChatMessage(BaseModel):
    """A whole one, or what a chunk adds to it."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChoice(BaseModel):
    """message in an answer, delta in a chunk."""

    index: int
    message: ChatMessage | None = None
    delta: ChatMessage | None = None
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    experts: list[TokenExpert] | None = None


class Answer(BaseModel):
    """A completion, a chat, or a chunk of one. adapter_generation: None = the base."""

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    adapter_generation: str | None
    choices: list[CompletionChoice] | list[ChatChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """parent, and what follows it: of adapters alone."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["molex"] = "molex"
    parent: str | None = None
    kind: str = "base"
    generation: str | None = None
    residency: Literal["disk", "host", "device"] = "device"
    pinned: bool = True
    num_bytes: int | None = None
