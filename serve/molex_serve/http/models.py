"""GET /v1/models: the base and every adapter over it, each a model that can be asked by its name."""

from typing import Any

from fastapi import APIRouter, Request

from molex_serve.errors import UnknownAdapter
from molex_serve.http.face import Face, face_of
from molex_serve.http.ports import Listed
from molex_serve.http.schemas import ModelCard

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [card.model_dump() for card in await _cards(face_of(request))]}


@router.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str) -> dict[str, Any]:
    face = face_of(request)
    alias = name.removeprefix(f"{face.settings.model_name}:")
    for card in await _cards(face):
        if card.id == alias:
            return card.model_dump()
    raise UnknownAdapter(f"there is no model and no adapter {name!r}; GET /v1/models lists them")


async def _cards(face: Face) -> list[ModelCard]:
    base = ModelCard(id=face.settings.model_name, created=face.created)
    known = await face.waiting(face.adapters.listing)
    return [base, *(card_of(face, listed) for listed in known)]


def card_of(face: Face, listed: Listed) -> ModelCard:
    return ModelCard(
        id=listed.alias,
        created=face.created,
        parent=face.settings.model_name,
        kind=listed.kind,
        generation=listed.generation or None,
        residency=listed.residency,
        pinned=listed.pinned,
        num_bytes=listed.num_bytes,
    )
