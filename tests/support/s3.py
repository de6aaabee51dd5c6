"""A server of one's own that speaks S3 (moto's), on a free port of this machine, with one bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import pytest

BUCKET = "clips"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "secret/of+the+tests",
    "AWS_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Its address; the keys are in the environment as long as it runs."""
    pytest.importorskip("obstore", reason="needs obstore: pip install 'dvdquant[serve-s3]'")
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install 'dvdquant[test]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server.start()
        try:
            host, port = server.get_host_and_port()
            url = f"http://{host}:{port}"
            httpx.put(f"{url}/{BUCKET}").raise_for_status()
            yield url
        finally:
            server.stop()
