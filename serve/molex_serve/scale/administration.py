"""Adapters come and go on all replicas at once: the single server's calls, with what each replica says beside it.

Where one replica refuses, nothing changes anywhere: the answer is the first refusal, and `replicas` has them all.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from molex_serve.errors import ServeError
from molex_serve.http.auth import settings_of
from molex_serve.http.limits import parsed
from molex_serve.http.problems import problem, refusal
from molex_serve.http.schemas import LoadBody, LoadLoraBody, UnloadLoraBody
from molex_serve.scale.ports import directory_of, engines_of
from molex_serve.scale.table import Held, Outcome, Report

LEVELS = ("device", "host", "disk")
router = APIRouter()


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    reports = await engines_of(request).reports("holdings")
    aliases = sorted({alias for report in reports for alias in report.held})
    base = settings_of(request).model_name
    return {"object": "list", "data": [described(alias, reports, base) for alias in aliases]}


@router.post("/v1/adapters")
async def load(request: Request, asked: Annotated[LoadBody, Depends(parsed(LoadBody))]) -> Response:
    outcome = await directory_of(request).load(asked.alias, asked.path, asked.expected_generation, asked.pin)
    if outcome.error is not None:
        return refused(outcome.error, outcome)
    return JSONResponse(described(asked.alias, outcome.reports, settings_of(request).model_name))


@router.delete("/v1/adapters/{alias:path}")
async def unload(request: Request, alias: str, expected_generation: str | None = None) -> Response:
    outcome = await directory_of(request).unload(alias, expected_generation)
    if outcome.error is not None:
        return refused(outcome.error, outcome)
    replicas = [_status(report) for report in outcome.reports]
    return JSONResponse({"object": "adapter", "alias": alias, "deleted": True, "replicas": replicas})


@router.post("/v1/load_lora_adapter")
async def load_lora(request: Request, asked: Annotated[LoadLoraBody, Depends(parsed(LoadLoraBody))]) -> Response:
    """vLLM's; without load_inplace the name must be new."""
    expected = None if asked.load_inplace else ""
    outcome = await directory_of(request).load(asked.lora_name, asked.lora_path, expected, False)
    if outcome.error is not None:
        return refused(outcome.error, outcome)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora(request: Request, asked: Annotated[UnloadLoraBody, Depends(parsed(UnloadLoraBody))]) -> Response:
    outcome = await directory_of(request).unload(asked.lora_name, None)
    if outcome.error is not None:
        return refused(outcome.error, outcome)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def described(alias: str, reports: Sequence[Report], base: str) -> dict[str, Any]:
    """One adapter on all replicas: the best place that it has, and its place on each."""
    held = {report.replica: report.held[alias] for report in reports if alias in report.held}
    known = max(held.values(), key=lambda one: bool(one.generation))
    return {
        "object": "adapter",
        "alias": alias,
        "parent": base,
        "kind": known.kind,
        "generation": known.generation or None,
        "residency": min((one.residency for one in held.values()), key=LEVELS.index),
        "pinned": known.pinned,
        "num_bytes": known.num_bytes,
        "replicas": [_place(replica, one) for replica, one in held.items()] + [_status(r) for r in reports if r.error],
    }


def refused(error: ServeError, outcome: Outcome) -> Response:
    """The single server's refusal, and in its body what every replica said."""
    response = refusal(error)
    body = {**problem(error), "replicas": [_status(report) for report in outcome.reports]}
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    return JSONResponse(body, response.status_code, headers)


def _place(replica: str, held: Held) -> dict[str, Any]:
    return {"replica": replica, "generation": held.generation or None, "residency": held.residency}


def _status(report: Report) -> dict[str, Any]:
    error = report.error
    told = {"status": 200} if error is None else {"status": error.status, "code": error.code, "message": str(error)}
    return {"replica": report.replica or None, **told}
