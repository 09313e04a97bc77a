"""Requests that nobody wrote: schemathesis reads the OpenAPI document and tries what it says, and
what it does not say.
"""

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.fake_engine import FakeEngine, make_facts
from tests.server.live import run_live
from tramontane.server.app import build_app
from tramontane.server.settings import ServerSettings
from tramontane.server.state import ServerState

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance,
          response_schema_conformance]  # fmt: skip
DOCUMENT = build_app(ServerState(ServerSettings())).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [
    (method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods
]
# What takes no body cannot be given a wrong one; any text is a name of a model.
CASES = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "requestBody" in DOCUMENT["paths"][path][method.lower()]
]


@pytest.fixture(scope="module")
def live():
    """A short context: an answer is short, however long a request asks for."""
    with run_live(lambda: FakeEngine(model=make_facts(max_seq_len=48))) as server:
        yield server


def try_operation(live, method: str, path: str, mode: GenerationMode, num_examples: int) -> None:
    strategy = SCHEMA[path][method].as_strategy(generation_mode=mode)

    @settings(
        max_examples=num_examples, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def run(case):
        response = case.call(base_url=live.url, timeout=10)
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400 and method != "HEAD":
            body = response.json()
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["message"]

    run()
    assert httpx2.get(live.url + "/health").status_code == 200
    live.wait_idle()


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_a_few_requests_of_each_kind(live, method, path, mode):
    """A11, shortly."""
    has_body = "requestBody" in DOCUMENT["paths"][path][method.lower()]
    try_operation(live, method, path, mode, 15 if has_body else 2)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_two_thousand_requests_of_each_kind(live, method, path, mode):
    """A11"""
    try_operation(live, method, path, mode, 2000)


def test_all_operations_are_tried():
    assert ("POST", "/v1/chat/completions") in OPERATIONS
    assert len(OPERATIONS) >= 12
