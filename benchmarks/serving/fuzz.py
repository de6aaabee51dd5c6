"""Bodies that no client would send: good ones with some bytes changed, cut, doubled or replaced by odd ones."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import httpx

__all__ = ["GOOD", "changed_bodies"]

GOOD: dict[str, Any] = {
    "prompt": "ring red right large black",
    "size": "24x24",
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "seed": 7,
    "mode": "switch",
    "delta": 0.1,
    "fps": 4,
    "negative_prompt": None,
    "input_reference": None,
}
_ODD = [
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
    b'"data:image/png;base64,iVBORw0KGgo="',
]
_TYPES = [
    "application/json",
    "application/json; charset=utf-16",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "text/xml",
    "",
]
_WANTED = (200, 400, 429)


def changed_bodies(client: httpx.Client, count: int, seed: int = 1) -> Counter[int]:
    """Send changed bodies, JSON and form, and return how often each status was answered.

    Args:
        client: A client of the server.
        count: The number of bodies.
        seed: Of the changes.

    Raises:
        AssertionError: An answer has another status than 200, 400 or 429, or is no error in words.
    """
    chance = random.Random(seed)
    given = {name: (None, str(value)) for name, value in GOOD.items() if value is not None}
    form = httpx.Request("POST", client.base_url, files={**given, "input_reference": ("x.png", b"\x89PNG")})
    form_body, form_type = form.read(), form.headers["content-type"]
    json_body = json.dumps(GOOD).encode()
    statuses: Counter[int] = Counter()
    for i in range(count):
        is_form = chance.random() < 0.3
        body = bytearray(form_body if is_form else json_body)
        for _ in range(chance.randrange(0, 4)):
            _change(body, chance)
        kind = form_type if is_form else _TYPES[0]
        if chance.random() < 0.1:
            kind = chance.choice(_TYPES)
        path = chance.choice(["/v1/videos", "/preflight"])
        answer = client.post(path, content=bytes(body), headers={"content-type": kind})
        statuses[answer.status_code] += 1
        words = answer.status_code == 200 or answer.json()["error"]["message"]
        assert answer.status_code in _WANTED and words, (i, answer.status_code, bytes(body), answer.text)  # noqa: PT018
    return statuses


def _change(body: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(body) + 1)
    how = chance.randrange(5)
    if how == 0:
        body[at:at] = chance.choice(_ODD)
    elif how == 1:
        del body[at : at + chance.randrange(1, 12)]
    elif how == 2:
        body[at : at + 1] = bytes([chance.randrange(256)])
    elif how == 3:
        body[at:at] = body[at : at + chance.randrange(1, 60)]
    else:
        value = chance.choice(_ODD)
        body[at : at + chance.randrange(1, 20)] = value
