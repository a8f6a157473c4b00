"""The pages' routes: what is at /, how it is cached and guarded, and that nothing of it comes from elsewhere."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import wire
from fakes import FakeBackend
from wire import ask

from service.gateway import pages

WEB = Path(pages.__file__).parent / "web"
PARTS = sorted(path.name for path in (WEB / "playground").iterdir() if path.name != "index.html")
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


async def test_files_are_served_as_they_are(served: wire.Served) -> None:
    files = {f"/playground/{name}": f"playground/{name}" for name in PARTS}
    for path, file in (files | {"/": "playground/index.html", "/docs": "docs.html"}).items():
        reply = await ask(served.port, "GET", path)
        assert (reply.status, reply.body) == (200, (WEB / file).read_bytes())
        assert reply.headers["content-type"] == TYPES[Path(file).suffix]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"


async def test_a_file_that_the_browser_has_is_not_sent_again(served: wire.Served) -> None:
    for path in ("/", "/docs", "/playground/main.js"):
        tag = (await ask(served.port, "GET", path)).headers["etag"]
        for known in (tag, f'"other", W/{tag}', "*"):
            async with wire.connect(served.port) as client:
                await client.send(wire.request("GET", path, headers=f"if-none-match: {known}\r\n"))
                reply = await client.read(has_body=False)
                assert (reply.status, reply.headers["etag"]) == (304, tag)
                assert (await client.ask("GET", "/healthz")).status == 200
        assert (await ask(served.port, "GET", path, headers='if-none-match: "other"\r\n')).status == 200


async def test_tags_tell_files_apart(served: wire.Served) -> None:
    tags = {(await ask(served.port, "GET", f"/playground/{name}")).headers["etag"] for name in PARTS}
    assert len(tags) == len(PARTS)


async def test_the_page_forbids_what_it_does_not_need(served: wire.Served) -> None:
    policy = (await ask(served.port, "GET", "/")).headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert rules["default-src"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'"}


@pytest.mark.parametrize("path", ["/", "/playground/main.js", "/docs"])
async def test_head_has_the_same_head(served: wire.Served, path: str) -> None:
    async with wire.connect(served.port) as client:
        whole, head = await client.ask("GET", path), await client.ask("HEAD", path)
        ours = {"date", "x-request-id"}
        assert {name: value for name, value in head.headers.items() if name not in ours} == {
            name: value for name, value in whole.headers.items() if name not in ours
        }


@pytest.mark.parametrize(
    "path", ["/playground/", "/playground/nothing.js", "/playground/index.html", "/playground/..%2fdocs.html", "/web"]
)
async def test_nothing_else_is_served(served: wire.Served, path: str) -> None:
    reply = await ask(served.port, "GET", path)
    assert (reply.status, reply.json["error"]["code"]) == (404, "route_not_found")


async def test_posting_to_the_page_stays_hugging_faces(served: wire.Served) -> None:
    reply = await ask(served.port, "POST", "/", b'{"inputs": "a fine film"}')
    assert reply.status == 200
    assert {one["label"] for one in reply.json[0]} == {"POSITIVE", "NEGATIVE"}
    reply = await ask(served.port, "DELETE", "/")
    assert (reply.status, reply.headers["allow"]) == (405, "GET, POST")


async def test_pages_need_no_key(backend: FakeBackend) -> None:
    async with wire.serve(backend, api_key="secret") as served:
        for path in ("/", "/playground/main.js", "/docs"):
            assert (await ask(served.port, "GET", path)).status == 200


def test_the_page_refers_to_this_server_and_to_files_that_are_there() -> None:
    texts = {path.name: path.read_text("utf-8") for path in (WEB / "playground").iterdir()}
    for name, text in texts.items():
        code = "\n".join(line for line in text.splitlines() if not line.startswith("// Oklab: "))
        others = set(re.findall(r"https?://[\w./]+", code)) - {"http://www.w3.org/2000/svg"}
        assert not others, name
        for wanted in re.findall(r'from "\./([^"]+)"|(?:href|src)="playground/([^"]+)"', text):
            assert "".join(wanted) in texts, name


def test_every_file_is_packaged() -> None:
    patterns = tomllib.loads((WEB.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for name in ("docs.html", *(f"playground/{part}" for part in (*PARTS, "index.html"))):
        path = f"gateway/web/{name}"
        assert any(fnmatch(path, glob) and path.count("/") == glob.count("/") for glob in patterns["service"]), path
