"""POST /v1/completions: texts or tokens go on; `echo` scores prompts, as evaluation harnesses ask for it."""

import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from molex_serve.http.asking import alias_of, check_choices, sampling_of
from molex_serve.http.face import Face, face_of
from molex_serve.http.generation import Generation, Job
from molex_serve.http.limits import parsed
from molex_serve.http.problems import Refused
from molex_serve.http.prompts import Prompt, check_length, of_texts
from molex_serve.http.schemas import CompletionBody
from molex_serve.http.streaming import Answering
from molex_serve.http.wording import CompletionWording

router = APIRouter()


@router.post("/v1/completions")
async def complete(request: Request, asked: Annotated[CompletionBody, Depends(parsed(CompletionBody))]) -> Response:
    face = face_of(request)
    _refuse_what_is_not_served(asked)
    alias = alias_of(asked, face.settings.model_name)
    prompts = await face.tokenizing(of_texts, face.vocabulary, asked.prompt)
    generation = Generation(face, _job(face, asked, alias, prompts))
    wording = CompletionWording(
        face.vocabulary, asked.logprobs is not None, asked.return_experts, "text_completion", "text_completion"
    )
    answering = Answering(generation, wording, asked.model or str(alias), asked.stream_options.include_usage)
    return await answering.respond(request, asked.stream)


def _job(face: Face, asked: CompletionBody, alias: str | None, prompts: list[Prompt]) -> Job:
    """max_tokens=0 generates nothing, which is of use with echo alone."""
    check_choices(len(prompts), asked.n)
    longest = face.engine.longest
    room = min(check_length(prompt, asked.max_tokens, face.settings.max_tokens, longest) for prompt in prompts)
    sampling = sampling_of(asked, room or int(asked.echo), asked.logprobs, face.vocabulary)
    return Job(
        id=f"cmpl-{uuid.uuid4().hex}",
        prompts=prompts,
        sampling=sampling if room else None,
        n=asked.n,
        stops=tuple(asked.stop),
        alias=alias,
        task=asked.task,
        echo=asked.echo,
        experts=asked.return_experts,
        scored=asked.logprobs if asked.echo else None,
    )


def _refuse_what_is_not_served(asked: CompletionBody) -> None:
    if asked.suffix:
        raise Refused("suffix is not served: this model only goes on from a text's end; leave it out", "suffix")
    if asked.best_of not in (None, asked.n):
        raise Refused(f"best_of is not served; ask for n={asked.best_of} and choose yourself", "best_of")
