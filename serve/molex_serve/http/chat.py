"""POST /v1/chat/completions: messages through the model's own template, answered by an assistant's message."""

import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from molex_serve.http.asking import alias_of, sampling_of
from molex_serve.http.face import Face, face_of
from molex_serve.http.generation import Generation, Job
from molex_serve.http.limits import parsed
from molex_serve.http.problems import Refused
from molex_serve.http.prompts import Prompt, check_length, of_messages
from molex_serve.http.schemas import ChatBody
from molex_serve.http.streaming import Answering
from molex_serve.http.wording import ChatWording

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(request: Request, asked: Annotated[ChatBody, Depends(parsed(ChatBody))]) -> Response:
    face = face_of(request)
    _refuse_tools(asked)
    alias = alias_of(asked, face.settings.model_name)
    prompt = await face.tokenizing(of_messages, face.vocabulary, asked.messages)
    generation = Generation(face, _job(face, asked, alias, prompt))
    wording = ChatWording(
        face.vocabulary, asked.logprobs, asked.return_experts, "chat.completion", "chat.completion.chunk"
    )
    answering = Answering(generation, wording, asked.model or str(alias), asked.stream_options.include_usage)
    return await answering.respond(request, asked.stream)


def _job(face: Face, asked: ChatBody, alias: str | None, prompt: Prompt) -> Job:
    """max_completion_tokens is max_tokens' new name, and wins."""
    given = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    max_tokens = check_length(prompt, given, face.settings.max_tokens, face.engine.longest)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused("top_logprobs takes logprobs=true beside it", "top_logprobs")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return Job(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        prompts=[prompt],
        sampling=sampling_of(asked, max_tokens, logprobs, face.vocabulary),
        n=asked.n,
        stops=tuple(asked.stop),
        alias=alias,
        task=asked.task,
        experts=asked.return_experts,
    )


def _refuse_tools(asked: ChatBody) -> None:
    called = any(message.tool_calls for message in asked.messages)
    if asked.tools or asked.functions or called or asked.tool_choice not in (None, "none", "auto"):
        raise Refused("tools are not served; leave them out, or ask for JSON by response_format", "tools")
