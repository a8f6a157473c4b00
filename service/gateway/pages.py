"""The pages that people look at: the playground at /, what it is made of, and /docs.

All of it comes from this package: nothing is built, nothing is loaded from another host. A path is looked up in a table
that is read once, at the start; no request ever names a file.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, HTTPException, Request, Response

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

# What a browser is to hold the page to, whatever a model or a user writes into it: only what this server serves is
# loaded or spoken to, and a text can become markup nowhere.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_GUARDS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


@dataclass(frozen=True)
class Page:
    """A file as it is served. Names carry no version, so browsers ask each time whether it is still the one."""

    body: bytes
    headers: Mapping[str, str]

    def reply(self, request: Request) -> Response:
        """The file, or 304 when the client has it."""
        known = request.headers.get("if-none-match", "")
        if known == "*" or self.headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def read_pages(folder: str) -> dict[str, Page]:
    """The files of a folder of web/, by name."""
    files = resources.files("service.gateway").joinpath("web", folder).iterdir()
    return {file.name: _page(file.name, file.read_bytes()) for file in files if file.is_file()}


def _page(name: str, body: bytes) -> Page:
    about = {
        "content-type": _TYPES[name.rpartition(".")[2]],
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "cache-control": "no-cache",
    }
    return Page(body, about | _GUARDS)


def add_pages(app: FastAPI) -> None:
    """No key is asked for: the pages say nothing that is not public, and ask for the key themselves."""
    docs = read_pages("")["docs.html"]
    parts = read_pages("playground")
    index = parts.pop("index.html")
    playground = Page(index.body, {**index.headers, "content-security-policy": _POLICY})

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return playground.reply(request)

    @app.get("/playground/{name}", include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        if name not in parts:
            raise HTTPException(404)
        return parts[name].reply(request)

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> Response:
        """A page of our own: FastAPI's loads its scripts from another host, which not every network lets it."""
        return docs.reply(request)
