import ast
import json
import re
from http.client import HTTPConnection
from itertools import product
from pathlib import Path

import httpx2
import pytest

from tests.server.live import run_live
from tramontane.errors import ConfigError
from tramontane.server import access
from tramontane.server.settings import ServerSettings, parse_keys

KEYS = ("first-key-0123456789", "second-key-0123456789")
OPEN = {"/", "/health"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@pytest.fixture(scope="module")
def locked():
    with run_live(api_keys=KEYS, allowed_hosts=("models.internal",)) as live:
        yield live


def list_paths(routes) -> set[str]:
    """Of all routes; the parameters of a path are "x"."""
    paths = set()
    for route in routes:
        if hasattr(route, "path"):
            paths.add(re.sub(r"\{.*?\}", "x", route.path))
        else:  # a router that was included
            paths |= list_paths(route.original_router.routes)
    return paths


def request(port: int, method: str, target: str) -> tuple[int, dict[str, str], bytes]:
    """Without a key, and with the path as it is spelt."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, target)
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    answer = response.status, headers, response.read()
    connection.close()
    return answer


def test_every_route_asks_for_a_key(locked):
    """A01: all routes, all methods, and other spellings of their paths."""
    paths = list_paths(locked.app.routes)
    assert {"/v1/chat/completions", "/metrics", "/openapi.json", "/tokenize"} <= paths
    files = {path for path in paths if path.startswith("/static/")}
    for path in (paths - files) | set(sorted(files)[:1]):  # the files have one route
        spellings = [path, "/" + path, "/." + path, path + "/", path.upper(), "/%2e" + path]
        for target, method in product(spellings, METHODS):
            status, headers, body = request(locked.port, method, target)
            if target in OPEN | files and method in ("GET", "HEAD"):
                assert status in (200, 404), (method, target)
                continue
            assert status == 401, (method, target)
            assert headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_what_is_not_there_asks_for_a_key_too(locked):
    """A01: who has no key learns nothing of which paths exist."""
    for target in ("/nothing", "//health", "/health/", "/static/../health", "/static/x", "*"):
        assert request(locked.port, "GET", target)[0] == 401, target
    assert locked.client.get("/nothing").status_code == 404


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0][:-1]}",
     f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0].upper()}", f"Bearer  {KEYS[0]}", f"Bearer {KEYS[0]} x",
     f"Bearer {KEYS[0]},{KEYS[1]}", f"Bearer {KEYS[0]}\u00e9", "Bearer default"],
)  # fmt: skip
def test_wrong_keys_are_refused(locked, header):
    """A02"""
    raw = [("authorization", header.encode("latin-1"))]
    response = httpx2.get(locked.url + "/v1/models", headers=raw)
    assert response.status_code == 401


def test_a_key_counts_in_one_header_alone(locked):
    """A02: not twice, not in the address."""
    twice = [("authorization", f"Bearer {KEYS[0]}"), ("authorization", f"Bearer {KEYS[1]}")]
    assert httpx2.get(locked.url + "/v1/models", headers=twice).status_code == 401
    for name in ("key", "api_key", "access_token"):
        assert httpx2.get(f"{locked.url}/v1/models?{name}={KEYS[0]}").status_code == 401


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_opens(locked, key, scheme):
    headers = {"authorization": f"{scheme} {key}"}
    assert httpx2.get(locked.url + "/v1/models", headers=headers).status_code == 200


def test_keys_are_compared_in_constant_time():
    """A02: a stopwatch cannot tell, so the source is read: no == and no `in` on what was sent."""
    tree = ast.parse(Path(access.__file__).read_text())
    ring = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "KeyRing")
    called = {ast.unparse(node.func) for node in ast.walk(ring) if isinstance(node, ast.Call)}
    assert "hmac.compare_digest" in called
    assert not [node for node in ast.walk(ring) if isinstance(node, ast.Compare)]
    loop = next(node for node in ast.walk(ring) if isinstance(node, ast.For))
    assert not [n for n in ast.walk(loop) if isinstance(n, ast.Break | ast.Return | ast.Raise)]


def test_the_server_is_not_open_to_others_without_a_key():
    """A02"""
    assert ServerSettings().host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConfigError, match="--api-key"):
            ServerSettings(host=host)
        ServerSettings(host=host, api_keys=KEYS)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        ServerSettings(host=host)


@pytest.mark.parametrize("key", ["", "a b", "\u00e9" * 20, "a\nb"])
def test_unusable_keys_are_refused_and_not_shown(key):
    with pytest.raises(ConfigError, match="API key") as caught:
        ServerSettings(api_keys=(key,))
    assert not key or key not in str(caught.value)


def test_a_file_holds_a_key_a_line():
    assert parse_keys("# ours\nabc\n\n  def  \n") == ("abc", "def")


def test_tenants_share_no_prefix(locked):
    """A03: each key, and each salt of a key, is apart; the turns are those of the key alone."""
    for key in KEYS:
        headers = {"authorization": f"Bearer {key}"}
        for salt in (None, "s"):
            body = {"prompt": "Same", "max_tokens": 1, "cache_salt": salt}
            httpx2.post(locked.url + "/v1/completions", headers=headers, json=body)
    sent = locked.engine.requests[-4:]
    tenants = [request.tenant for request in sent]
    assert len({(request.tenant, request.cache_salt) for request in sent}) == 4
    assert len(set(tenants)) == 2
    assert not any(key in tenant for tenant in tenants for key in KEYS)
    assert locked.post("/v1/completions", prompt="x", cache_salt="").status_code == 400


@pytest.mark.parametrize(
    ("host", "is_known"),
    [("127.0.0.1", True), ("localhost:8000", True), ("[::1]:8000", True), ("10.0.0.1:80", True),
     ("evil.example", False), ("localhost.evil.example:8000", False), ("", False),
     ("127.0.0.1.evil.example", False), ("models.internal:8000", True)],
)  # fmt: skip
def test_names_of_the_server_are_known(locked, host, is_known):
    """A page whose name was rebound to this machine sends its own name as Host."""
    response = locked.client.get("/v1/models", headers={"host": host})
    assert response.status_code == (200 if is_known else 403)
    if not is_known:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_pages_of_other_sites_are_refused(server):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
        response = server.client.post("/v1/completions", headers={"origin": origin},
                                      json={"prompt": "x"})  # fmt: skip
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
    own = server.client.get("/v1/models", headers={"origin": server.url})
    assert own.status_code == 200


def test_pages_that_the_operator_allows_may_ask():
    with run_live(api_keys=KEYS, allowed_origins=("https://chat.example",)) as live:
        headers = {"origin": "https://chat.example", "access-control-request-method": "POST",
                   "access-control-request-headers": "authorization"}  # fmt: skip
        preflight = httpx2.options(live.url + "/v1/chat/completions", headers=headers)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        answer = live.client.get("/v1/models", headers={"origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert live.client.get("/v1/models", headers={"origin": "https://x"}).status_code == 403
        assert httpx2.options(live.url + "/v1/models").status_code == 401


def test_a_form_of_another_site_cannot_post(server):
    """Without JSON as its type a request needs no preflight; it is not read."""
    body = json.dumps({"prompt": "x"})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = server.client.post("/v1/completions", content=body,
                                      headers={"content-type": kind})  # fmt: skip
        assert response.status_code == 400
        assert "Content-Type: application/json" in response.json()["error"]["message"]
