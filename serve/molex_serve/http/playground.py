"""GET /: a page on which to try the base and its adapters, and the files that it is made of.

It is served as it lies in the package: no build, nothing from elsewhere, works without a network. The page itself asks
for no key; what it fetches does. Its policy lets the browser run and load nothing but these files, and send nothing to
anybody but this server; an alias or a text of a model that looks like HTML stays a text.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent / "assets" / "playground"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:"),
    *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"),
)
HEADERS = {
    "Content-Security-Policy": "; ".join(POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # may be kept, and is asked for again by its tag
}
METHODS = ["GET", "HEAD"]
router = APIRouter()


@dataclass(frozen=True)
class Asset:
    content: bytes
    media_type: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> "Asset":
        content = path.read_bytes()
        return cls(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


PAGE = Asset.read(FOLDER / "index.html")
PARTS = {path.name: Asset.read(path) for path in FOLDER.iterdir() if path.suffix in TYPES and path.name != "index.html"}


@router.api_route("/", methods=METHODS)
async def page(request: Request) -> Response:
    return PAGE.response(request)


@router.api_route("/playground/{name}", methods=METHODS)
async def part(request: Request, name: str) -> Response:
    """One of the files that are there, and nothing else: a name is looked up, never made a path."""
    if name not in PARTS:
        raise HTTPException(404, "Not Found")
    return PARTS[name].response(request)
