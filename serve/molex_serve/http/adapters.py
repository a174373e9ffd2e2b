"""Administration: adapters come and go while the server runs. Under the admin key, from inside one folder only."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse

from molex_serve.adapters.paths import inside
from molex_serve.http.face import Face, face_of
from molex_serve.http.limits import parsed
from molex_serve.http.models import card_of
from molex_serve.http.ports import Listed
from molex_serve.http.schemas import LoadBody, LoadLoraBody, UnloadLoraBody

router = APIRouter()


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    face = face_of(request)
    known = await face.waiting(face.adapters.listing)
    return {"object": "list", "data": [_described(face, listed) for listed in known]}


@router.post("/v1/adapters")
async def load(request: Request, asked: Annotated[LoadBody, Depends(parsed(LoadBody))]) -> dict[str, Any]:
    face = face_of(request)
    listed = await _load(face, asked.alias, asked.path, asked.expected_generation, asked.pin)
    return _described(face, listed)


@router.delete("/v1/adapters/{alias:path}")
async def unload(request: Request, alias: str, expected_generation: str | None = None) -> dict[str, Any]:
    await _unload(face_of(request), alias, expected_generation)
    return {"object": "adapter", "alias": alias, "deleted": True}


@router.post("/v1/load_lora_adapter")
async def load_lora(
    request: Request, asked: Annotated[LoadLoraBody, Depends(parsed(LoadLoraBody))]
) -> PlainTextResponse:
    """vLLM's; without load_inplace the name must be new."""
    expected = None if asked.load_inplace else ""
    await _load(face_of(request), asked.lora_name, asked.lora_path, expected, False)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora(
    request: Request, asked: Annotated[UnloadLoraBody, Depends(parsed(UnloadLoraBody))]
) -> PlainTextResponse:
    await _unload(face_of(request), asked.lora_name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def _load(face: Face, alias: str, path: str, expected_generation: str | None, pin: bool) -> Listed:
    folder = await face.waiting(inside, face.settings.adapter_root, path)
    return await face.waiting(face.adapters.load, alias, str(folder), expected_generation, pin)


async def _unload(face: Face, alias: str, expected_generation: str | None) -> None:
    await face.waiting(face.adapters.unload, alias, expected_generation)
    face.metrics.forget(alias)


def _described(face: Face, listed: Listed) -> dict[str, Any]:
    card = card_of(face, listed).model_dump(exclude={"id", "object", "created", "owned_by"})
    return {"object": "adapter", "alias": listed.alias, **card}
