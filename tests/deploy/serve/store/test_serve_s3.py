"""Clips in an object store, against a server that speaks S3: whole or not at all, ranges, links, expiry, and keys in no text."""

from __future__ import annotations

import asyncio
import http.server
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.local import LocalWorkers
from dvdquant.deploy.serve.jobs import NewJob, new_video_id
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.settings import Limits, ObjectStore, ServerSettings, WorkerSettings
from dvdquant.deploy.serve.store.files import ClipFiles, FolderFiles
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore
from dvdquant.deploy.serve.store.stores import open_files
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.system.whole_file import write_whole
from tests.support.s3 import BUCKET, KEYS, s3_server

CLIP = bytes(range(256)) * 8
WHAT = NewJob("wan", {"prompt": "a cat"}, 4, (24, 16), 2.0, "request-1")
HOUR = 3600.0


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The server."""
    with s3_server() as url:
        yield url


@pytest.fixture
def objects(endpoint: str, tmp_path: Path) -> ClipFiles:
    """A place in it that no other test uses."""
    return open_files(tmp_path, ObjectStore(f"s3://{BUCKET}/{tmp_path.name}", endpoint))


@pytest.fixture(params=["folder", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> ClipFiles:
    """An empty place of either kind."""
    found: ClipFiles = FolderFiles(tmp_path / "v") if request.param == "folder" else request.getfixturevalue("objects")
    return found


def _all(files: ClipFiles, video: str) -> bytes | None:
    async def read() -> bytes | None:
        size = await files.size(video)
        return None if size is None else await files.read(video, 0, size)

    return asyncio.run(read())


def test_a_clip_is_kept_read_replaced_and_deleted(files: ClipFiles) -> None:
    video, other = new_video_id(), new_video_id()
    assert _all(files, video) is None
    files.delete(video)
    assert files.write(video, lambda path: write_whole(path, CLIP)) == len(CLIP)
    assert _all(files, video) == CLIP
    assert asyncio.run(files.read(video, 10, 20)) == CLIP[10:20]
    files.write(other, lambda path: write_whole(path, b"x"))
    files.write(video, lambda path: write_whole(path, CLIP[:7]))
    assert _all(files, video) == CLIP[:7]
    assert sorted(files.ids()) == sorted([video, other])
    files.delete(video)
    assert list(files.ids()) == [other]
    with pytest.raises(FileNotFoundError):
        asyncio.run(files.read(video, 0, 1))
    assert files.picture(video, "input_reference") is None
    files.write_picture(video, "input_reference", b"png")
    files.write(video, lambda path: write_whole(path, CLIP))
    assert sorted(files.ids()) == sorted([video, other])
    files.delete_clip(video)
    assert (_all(files, video), files.picture(video, "input_reference")) == (None, b"png")
    files.delete(video)
    assert files.picture(video, "input_reference") is None
    with pytest.raises(ValueError, match="no id"):
        files.write("../../etc/passwd", lambda path: write_whole(path, b""))


def test_a_large_clip_goes_up_in_parts_and_is_there_when_it_is_whole(objects: ClipFiles, tmp_path: Path) -> None:
    video, data = new_video_id(), os.urandom(1 << 20) * 17
    seen: list[bytes | None] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            # In one request: a size and bytes that are asked for apart may be of the old clip and of the new one.
            seen.append(asyncio.run(objects.read(video, 0, len(data))))

    objects.write(video, lambda path: write_whole(path, CLIP))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert objects.write(video, lambda path: write_whole(path, data)) == len(data)
    finally:
        done.set()
        watcher.join()
    assert _all(objects, video) == data
    assert set(seen) <= {CLIP, data}  # the old one or the new one, never a part
    assert list((tmp_path / "uploads").iterdir()) == []


def test_an_encoder_that_fails_leaves_nothing(objects: ClipFiles, tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        from dvdquant.system.whole_file import atomic_path

        with atomic_path(path) as temporary:
            temporary.write_bytes(CLIP)
            raise RuntimeError("broken")

    video = new_video_id()
    with pytest.raises(RuntimeError, match="broken"):
        objects.write(video, broken)
    assert _all(objects, video) is None
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_link_works_without_keys_and_for_a_while(endpoint: str, tmp_path: Path, objects: ClipFiles) -> None:
    video = new_video_id()
    objects.write(video, lambda path: write_whole(path, CLIP))
    assert objects.link(video) is None
    linked = open_files(tmp_path, ObjectStore(f"s3://{BUCKET}/{tmp_path.name}", endpoint, 90.0))
    link = linked.link(video)
    assert link is not None
    assert "X-Amz-Expires=90&" in link
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in link
    got = httpx.get(link)
    assert (got.content, got.headers["content-type"]) == (CLIP, "video/mp4")


# ---------------------------------------------------------------------------------------------------------------- HTTP


def _client(files: ClipFiles, tmp_path: Path) -> tuple[Any, str]:
    """The HTTP interface over a store with one finished clip."""
    from starlette.testclient import TestClient

    from dvdquant.deploy.serve.http.app import make_app
    from dvdquant.deploy.serve.service import Service

    tmp_path.mkdir(exist_ok=True)
    store = SqliteStore(tmp_path / "jobs.sqlite", keep=HOUR)
    store.create(WHAT, 10)
    job = store.claim("w", ("wan",), 60)
    assert job is not None
    files.write(job.id, lambda path: write_whole(path, CLIP))
    assert store.complete(job.id, job.token or "", {}, HOUR, "8")
    settings = ServerSettings(models=(), data=tmp_path, limits=Limits())
    service = Service(settings, store, files, LocalWorkers(), ServerMetrics())
    return TestClient(make_app(service), base_url="http://127.0.0.1"), job.id


RANGES = [
    "bytes=0-0",
    "bytes=10-29",
    "bytes=2000-",
    "bytes=-5",
    "bytes=5-99999",
    "bytes=2048-",
    "bytes=-99999",
    "bytes=9-3",
]


def test_ranges_are_those_of_a_file(objects: ClipFiles, tmp_path: Path) -> None:
    """Every answer has status, bytes and headers of Starlette's for the same clip in a folder."""
    (mine, video), (theirs, same) = _client(objects, tmp_path), _client(FolderFiles(tmp_path / "v"), tmp_path / "b")
    for method in ("GET", "HEAD"):
        for wanted in ["", "nonsense", "bytes=", "items=0-5", *RANGES]:
            headers = {"range": wanted} if wanted else {}
            answers = [
                client.request(method, f"/v1/videos/{name}/content", headers=headers)
                for client, name in ((mine, video), (theirs, same))
            ]
            if answers[1].status_code in (200, 206, 416) and wanted != "bytes=9-3":
                assert answers[0].status_code == answers[1].status_code, wanted
                if answers[0].status_code != 416:
                    assert answers[0].content == answers[1].content
                    for name in ("content-length", "content-type", "content-range", "accept-ranges"):
                        assert answers[0].headers.get(name) == answers[1].headers.get(name), (wanted, name)
            assert answers[0].status_code in (200, 206, 416)
    assert mine.delete(f"/v1/videos/{video}").status_code == 200
    assert list(objects.ids()) == []


def test_clients_are_sent_to_a_link(endpoint: str, objects: ClipFiles, tmp_path: Path) -> None:
    linked = open_files(tmp_path, ObjectStore(f"s3://{BUCKET}/{tmp_path.name}", endpoint, 60.0))
    client, video = _client(linked, tmp_path)
    answer = client.get(f"/v1/videos/{video}/content", follow_redirects=False)
    assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
    assert httpx.get(answer.headers["location"], headers={"range": "bytes=3-5"}).content == CLIP[3:6]
    linked.delete(video)
    assert client.get(f"/v1/videos/{video}/content", follow_redirects=False).status_code == 404


# ------------------------------------------------------------------------------------------------------------- failures


class _Quoting(http.server.BaseHTTPRequestHandler):
    """Refuses every request, and quotes its key and its secret in the reason."""

    def _refuse(self) -> None:
        text = f"<Error><Code>SignatureDoesNotMatch</Code>{KEYS['AWS_ACCESS_KEY_ID']} {KEYS['AWS_SECRET_ACCESS_KEY']}</Error>"
        self.send_response(403)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _refuse

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_keys_are_in_no_error_setting_or_log(
    endpoint: str, objects: ClipFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Quoting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    refusing = f"http://127.0.0.1:{server.server_port}"
    caplog.set_level(logging.DEBUG)
    texts = []
    with pytest.raises(OutputError, match="cannot be used for clips") as refused:
        open_files(tmp_path, ObjectStore(f"s3://{BUCKET}/x", refusing))
    texts.append(f"{refused.value!s} {refused.value!r}")
    with pytest.raises(OutputError, match="cannot be used for clips"):
        open_files(tmp_path, ObjectStore("s3://no-such-bucket/x", endpoint))
    server.shutdown()
    client, video = _client(objects, tmp_path)
    objects.store = _refusing_store(server.server_port)  # type: ignore[attr-defined]
    server.server_close()
    away = client.get(f"/v1/videos/{video}/content")
    assert away.status_code == 503
    assert away.headers["retry-after"]
    texts += [away.text, caplog.text, repr(WorkerSettings("w", (), "d", files=ObjectStore("s3://a")))]
    for value in (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert not any(value in text for text in texts)


def _refusing_store(port: int) -> Any:
    from obstore.store import S3Store

    retry: Any = {"max_retries": 0}
    return S3Store(BUCKET, endpoint=f"http://127.0.0.1:{port}", client_options={"allow_http": True}, retry_config=retry)


@pytest.mark.parametrize(
    ("address", "server", "said"),
    [
        ("clips", None, "no place for clips"),
        ("s3://", None, "no place for clips"),
        ("s3://key:secret@clips/x", None, "holds a key"),
        ("s3://clips/x", "http://key:secret@minio:9000", "holds a key"),
        ("s3://clips/a/../b", None, "no prefix"),
        ("s3://clips", "minio:9000", "no address of a server"),
    ],
)
def test_addresses_that_are_refused(address: str, server: str | None, said: str, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="needs obstore: pip install 'dvdquant[serve-s3]'")
    with pytest.raises(UnsupportedError, match=re.escape(said)) as refused:
        open_files(tmp_path, ObjectStore(address, server))
    assert "secret" not in str(refused.value)


def test_a_server_leaves_clips_of_others_and_expires_its_own(objects: ClipFiles, tmp_path: Path) -> None:
    """Of a shared place nobody knows whose a clip is; what expires is deleted there, too."""
    from dvdquant.deploy.serve.expiry import expire_for_ever
    from dvdquant.deploy.serve.server import ServerRun

    store = SqliteStore(tmp_path / "jobs.sqlite", keep=HOUR)
    store.create(WHAT, 10)
    job = store.claim("w", ("wan",), 60)
    assert job is not None
    for video in (job.id, other := new_video_id()):
        objects.write(video, lambda path: write_whole(path, CLIP))
    assert store.complete(job.id, job.token or "", {}, 0.0, "8")
    run = ServerRun(ServerSettings(models=(), data=tmp_path, devices=()), store, objects, ServerMetrics(), ())
    run.recover()
    assert sorted(objects.ids()) == sorted([job.id, other])

    async def some_time() -> None:
        task = asyncio.create_task(expire_for_ever(run.service))
        end = time.monotonic() + 60
        while job.id in set(objects.ids()) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(some_time())
    assert list(objects.ids()) == [other]
    run.service.close()
