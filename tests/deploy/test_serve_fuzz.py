"""Requests that nobody would send: made up from our own description, and good ones with bytes changed. Never a 500."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.serving.process import PROMPT, ServerProcess
from tests.support.running import tiny_wan_export

pytestmark = pytest.mark.slow
GOOD: dict[str, Any] = {
    "prompt": PROMPT,
    "size": "24x24",
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "seed": 7,
    "mode": "switch",
    "delta": 0.1,
    "fps": 4,
    "negative_prompt": None,
}
ODD = [
    b"",
    b"\0",
    b'"',
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-1",
    b"[" * 40,
    b"9" * 30,
    b"\xff",
    b"null",
    b"true",
    b"{}",
    b",,",
    b"\xe2\x98\x83",
]
TYPES = [
    "application/json",
    "application/json; charset=utf-16",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "text/xml",
    "",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that draws at once."""
    with ServerProcess(
        tiny_wan_export(), tmp_path_factory.mktemp("fuzz") / "data", stub={"STUB_SECONDS": "0"}
    ) as server:
        yield server


def test_requests_made_up_from_the_description(server: ServerProcess) -> None:
    _made_up(server, 150)


@pytest.mark.stress
def test_many_requests_made_up_from_the_description(server: ServerProcess) -> None:
    _made_up(server, 10_000)


def _made_up(server: ServerProcess, count: int) -> None:
    """Every answer has a status and a shape that the description names."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'dvdquant[test]'")
    checks = pytest.importorskip("schemathesis.checks")
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    with server.client() as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    wanted = [checks.not_a_server_error, response_schema_conformance, status_code_conformance]
    statuses: Counter[int] = Counter()

    @given(case=schema.as_strategy())
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        answer = case.call(base_url=server.url)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ask()
    assert 500 not in statuses
    assert {200, 400, 404} & set(statuses)


def test_changed_bytes(server: ServerProcess) -> None:
    _changed(server, 400)


@pytest.mark.stress
def test_a_hundred_thousand_changed_bodies(server: ServerProcess) -> None:
    _changed(server, 100_000)


def _changed(server: ServerProcess, count: int) -> None:
    """Good bodies, JSON and form, with some bytes changed, cut, doubled or replaced by odd ones."""
    chance = random.Random(1)
    form = httpx.Request("POST", server.url, files={k: (None, str(v)) for k, v in GOOD.items() if v is not None})
    form_body, form_type = form.read(), form.headers["content-type"]
    statuses: Counter[int] = Counter()
    with server.client() as client:
        for i in range(count):
            is_form = chance.random() < 0.3
            body = bytearray(form_body if is_form else json.dumps(GOOD).encode())
            for _ in range(chance.randrange(0, 4)):
                _change(body, chance)
            kind = form_type if is_form else TYPES[0]
            if chance.random() < 0.1:
                kind = chance.choice(TYPES)
            path = chance.choice(["/v1/videos", "/preflight"])
            answer = client.post(path, content=bytes(body), headers={"content-type": kind})
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 400, 429), (i, answer.status_code, bytes(body), answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
        assert client.get("/ready").status_code == 200
    assert statuses[200] > count // 50
    assert statuses[400] > count // 5


def _change(body: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(body) + 1)
    how = chance.randrange(5)
    if how == 0:
        body[at:at] = chance.choice(ODD)
    elif how == 1:
        del body[at : at + chance.randrange(1, 12)]
    elif how == 2:
        body[at : at + 1] = bytes([chance.randrange(256)])
    elif how == 3:
        body[at:at] = body[at : at + chance.randrange(1, 60)]
    else:
        value = chance.choice(ODD)
        body[at : at + chance.randrange(1, 20)] = value
