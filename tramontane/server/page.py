"""The page at `/` and its files: read once at the start, sent with headers that trust nothing.

The page may load scripts and styles of this server alone and talk to this server alone.
"""

import mimetypes
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tramontane.server.errors import ApiError

STATIC_FOLDER = Path(__file__).parent / "static"
_INDEX = "index.html"
_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
          ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}  # fmt: skip
# A script that hands text to a parser of markup raises an error (trusted types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}


class PageFile(NamedTuple):
    """A file, ready to be sent."""

    content: bytes
    media_type: str
    etag: str


def load_page(folder: Path = STATIC_FOLDER) -> dict[str, PageFile]:
    """The files of the page by their paths on the server; `index.html` is `/`."""
    files = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            file = _read(path)
            files[f"/static/{path.name}"] = file
            if path.name == _INDEX:
                files["/"] = file
    return files


def list_open_paths(files: Collection[str]) -> frozenset[str]:
    """What a browser reads before a person has given it a key."""
    return frozenset({"/", "/health", *files})


def build_page_router(files: dict[str, PageFile]) -> APIRouter:
    """Routes for exactly these files: no path of a request reaches the file system."""
    router = APIRouter(include_in_schema=False)

    async def send_file(http: Request) -> Response:
        path = http.url.path
        if path not in files:
            raise ApiError(
                404, f"this copy of tramontane has no page (looked in {STATIC_FOLDER.name}/"
                f"{_INDEX}); the API is under /v1",
                type="invalid_request_error", code="not_found",
            )  # fmt: skip
        return _answer(files[path], http.headers.get("if-none-match", ""))

    for path in {"/", *files}:
        router.add_api_route(path, send_file, methods=["GET", "HEAD"], response_class=Response)
    return router


def _answer(file: PageFile, known: str) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    if file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    etag = f'"{sha256(content).hexdigest()[:32]}"'
    return PageFile(content, _TYPES.get(path.suffix, guessed), etag)
