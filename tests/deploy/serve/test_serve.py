"""``dvdq-serve`` as processes: a real export, OpenAI's client, kills, cancels, overload, a drain, and the live page.

Where the number of jobs matters and not the clip, the engine is a stub that sleeps, behind the same worker.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.serving.fuzz import changed_bodies
from benchmarks.serving.process import PROMPT, START_SECONDS, ServerProcess
from dvdquant.deploy.generation.encoder import count_frames
from tests.support.browser import headless_chromium
from tests.support.exporting import TINY_WAN
from tests.support.forked_processes import forked_workers
from tests.support.postgres import postgres
from tests.support.running import short_wan_export

STUB = {"STUB_SECONDS": "0.02"}
BAD_PROMPT = "ring red right large"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the real engines."""
    with ServerProcess(short_wan_export(), tmp_path_factory.mktemp("real") / "data", "--no-spare") as server:
        yield server


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose calls of the transformer take 20 ms, with a short queue and files that make it fail."""
    folder = tmp_path_factory.mktemp("stub")
    variables = {**STUB, **forked_workers(), "STUB_KILL": str(folder / "kill"), "STUB_FAIL": str(folder / "fail")}
    options = ("--queue", 8, "--max-steps", 1000)
    with ServerProcess(short_wan_export(), folder / "data", *options, stub=variables) as server:
        yield server


# ------------------------------------------------------------------------------------------------------------ the clip


def test_openai_client_does_it_all(server: ServerProcess) -> None:
    openai = pytest.importorskip("openai", reason="needs openai: pip install 'dvdquant[test]'")
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        (name,) = [model.id for model in client.models.list()]
        more = {"num_inference_steps": 4, "guidance_scale": 1, "seed": 5}
        made = client.videos.create(prompt=PROMPT, model=name, size="24x24", extra_body=more)
        assert (made.object, made.status, made.size) == ("video", "queued", "24x24")
        done = client.videos.poll(made.id, poll_interval_ms=100)
        assert (done.status, done.progress, done.error) == ("completed", 100, None)
        clip = client.videos.download_content(made.id).read()
        other = client.videos.create(prompt=PROMPT, model=name, extra_body={**more, "num_inference_steps": 2})
        assert [video.id for video in client.videos.list(limit=2)][:2] == [other.id, made.id]
        assert client.videos.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(made.id)
        with pytest.raises(openai.BadRequestError, match=r"available: .*fix: "):
            client.videos.create(prompt=BAD_PROMPT, model=name)
        with pytest.raises(openai.BadRequestError, match="remix is not supported"):
            client.videos.remix(other.id, prompt=PROMPT)
        client.videos.poll(other.id, poll_interval_ms=100)
    _same_clip_as_the_library(clip, server.out)


def _same_clip_as_the_library(clip: bytes, out: Path) -> None:
    """The server's file is, byte by byte, what the same request gives in Python."""
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
    from dvdquant.deploy.generation.video import write_mp4

    path = out.parent / "library.mp4"
    with open_generator(Artifact.open(out), pipeline=TINY_WAN, backend="onnxruntime", device="cpu") as generator:
        result = generator.generate(GenerateRequest(PROMPT, steps=4, guidance=1, seed=5))
        write_mp4(path, result.frames, generator.fps(len(result.frames)))
    assert count_frames(path) == len(result.frames)
    assert path.read_bytes() == clip


def test_what_is_said_of_a_clip(server: ServerProcess) -> None:
    with server.client() as client:
        plan = client.post("/preflight", json={"prompt": PROMPT, "num_inference_steps": 3, "mode": "a4"}).json()
        assert (plan["transformer_calls"], plan["mode"], plan["executed"]["backend"]) == (6, "a4", "onnxruntime")
        before = client.get("/v1/videos").json()["data"]
        made = server.create(client, num_inference_steps=3, mode="a4", seconds="2", fps=4)
        done = server.wait(client, made["id"])
        ours = done["dvdquant"]
        assert (ours["bits"], ours["attempts"], ours["steps"]) == ([4, 4, 4], 1, 3)
        assert ours["summary"]["average_bits"] == 4
        assert ours["summary"]["frames"] == 8
        assert done["seconds"] == "2"
        assert len(client.get("/v1/videos?limit=100").json()["data"]) == len(before) + 1
        figures = client.get("/metrics").text
    for name in (
        "dvdq_step_seconds_count",
        "dvdq_wait_seconds_count",
        "dvdq_clips_total{model=",
        "dvdq_worker_resident_bytes",
    ):
        assert name in figures, figures


def test_ranges_of_a_clip(server: ServerProcess) -> None:
    with server.client() as client:
        done = server.wait(client, server.create(client)["id"])
        place = f"/v1/videos/{done['id']}/content"
        whole = client.get(place)
        assert whole.headers["content-type"] == "video/mp4"
        part = client.get(place, headers={"range": "bytes=10-29"})
        assert (part.status_code, part.content) == (206, whole.content[10:30])
        assert client.get(place, headers={"range": f"bytes={len(whole.content)}-"}).status_code == 416
        assert client.head(place).headers["content-length"] == str(len(whole.content))
        assert client.get(place, params={"variant": "thumbnail"}).status_code == 400


def test_forms_work_and_pictures_are_refused_in_words(server: ServerProcess) -> None:
    with server.client() as client:
        fields = {"prompt": PROMPT, "num_inference_steps": "2", "guidance_scale": "1"}
        made = client.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
        assert made.status_code == 200, made.text
        refused = client.post("/v1/videos", data=fields, files={"input_reference": ("x.png", b"\x89PNG" * 100)})
        assert refused.status_code == 400
        assert "draws from words alone" in refused.json()["error"]["message"]
        assert server.wait(client, made.json()["id"])["status"] == "completed"


def test_errors_have_one_shape_and_name_no_path(server: ServerProcess) -> None:
    with server.client() as client:
        answers = [
            client.post("/v1/videos", json={"prompt": PROMPT, "size": "1280x720"}),
            client.post("/v1/videos", json={"prompt": PROMPT, "num_inference_steps": 101}),
            client.post("/v1/videos", json={"prompt": PROMPT, "model": "other"}),
            client.post("/v1/videos", json={"prompt": PROMPT, "schedule": "../../etc/passwd"}),
            client.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}),
            client.post("/v1/videos", content=b"[1]", headers={"content-type": "application/json"}),
            client.post("/v1/videos", content=b"x", headers={"content-type": "text/plain"}),
            client.post("/v1/videos", content=b"--x", headers={"content-type": "multipart/form-data; boundary=y"}),
            client.post("/v1/videos", content=b"", headers={"content-type": "multipart/form-data"}),
            client.get("/v1/videos", params={"limit": "0"}),
            client.get("/v1/videos", params={"after": "nothing"}),
            client.get("/v1/videos", params={"order": "up"}),
            client.get("/v1/videos/video_1"),
            client.get("/v1/videos/..%2f..%2fetc%2fpasswd/content"),
            client.get("/static/..%2fpage.html"),
            client.get("/nothing"),
            client.put("/v1/videos"),
            client.post("/v1/videos", content=b" " * (1 << 21), headers={"content-type": "application/json"}),
        ]
    wanted = [400] * 12 + [404] * 4 + [405, 413]
    assert [answer.status_code for answer in answers] == wanted
    for answer in answers:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code", "available", "fix"}
        assert error["message"]
        assert str(server.out.parent) not in answer.text
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_pages_of_other_sites_get_nothing(server: ServerProcess) -> None:
    with server.client() as client:
        body: dict[str, Any] = {"json": {"prompt": PROMPT}}
        assert client.post("/v1/videos", headers={"origin": "https://evil.example"}, **body).status_code == 403
        assert client.post("/v1/videos", headers={"origin": "null"}, **body).status_code == 403
        assert client.get("/v1/videos", headers={"host": "evil.example"}).status_code == 421
        options = client.options("/v1/videos", headers={"origin": server.url, "access-control-request-method": "POST"})
        assert not any(name.startswith("access-control") for name in options.headers)
        own = client.post("/preflight", headers={"origin": server.url}, **body)
        assert own.status_code == 200


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_cancel_and_delete_stop_a_job_within_a_call(stub: ServerProcess) -> None:
    with stub.client() as client:
        for how in ("cancel", "delete"):
            made = stub.create(client, num_inference_steps=900)
            place = f"/v1/videos/{made['id']}"
            while not (state := client.get(place).json())["dvdquant"]["bits"]:
                assert state["status"] in ("queued", "in_progress")
            if how == "cancel":
                client.post(f"{place}/cancel")
                state = stub.wait(client, made["id"])
                assert (state["status"], state["error"]["code"]) == ("failed", "cancelled")
                assert len(state["dvdquant"]["bits"]) < 900
                assert client.get(f"{place}/content").status_code == 404
            else:
                assert client.delete(place).json()["deleted"]
                assert client.get(place).status_code == 404
            # The worker is free again long before 900 calls would have ended.
            assert stub.wait(client, stub.create(client)["id"])["status"] == "completed"
        waiting = [stub.create(client, num_inference_steps=900 if i == 0 else 2)["id"] for i in range(3)]
        assert client.post(f"/v1/videos/{waiting[2]}/cancel").json()["status"] == "failed"
        client.post(f"/v1/videos/{waiting[0]}/cancel")
        assert stub.wait(client, waiting[1])["status"] == "completed"


def test_overload_is_answered_429_and_loses_nothing(stub: ServerProcess) -> None:
    with stub.client() as client:
        blocker = stub.create(client, num_inference_steps=900)["id"]
        while client.get(f"/v1/videos/{blocker}").json()["status"] == "queued":
            time.sleep(0.02)
        body = {"prompt": PROMPT, "num_inference_steps": 1, "guidance_scale": 1}
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda i: client.post("/v1/videos", json={**body, "seed": i}), range(20)))
        assert Counter(answer.status_code for answer in answers) == {200: 8, 429: 12}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"
        taken = [answer.json()["id"] for answer in answers if answer.status_code == 200]
        assert {client.get(f"/v1/videos/{video}").json()["dvdquant"]["queue_position"] for video in taken} == set(
            range(8)
        )
        client.post(f"/v1/videos/{blocker}/cancel")
        assert {stub.wait(client, video)["status"] for video in taken} == {"completed"}


def test_a_killed_worker_is_replaced_and_its_job_runs_again(stub: ServerProcess) -> None:
    kill = Path(stub.stub["STUB_KILL"] if stub.stub else "")
    with stub.client() as client:
        before = stub.worker_pids()
        kill.touch()
        videos = [stub.create(client, seed=i)["id"] for i in range(3)]
        ended = [stub.wait(client, video) for video in videos]
        assert [state["status"] for state in ended] == ["completed"] * 3
        assert [state["dvdquant"]["attempts"] for state in ended] == [2, 1, 1]
        assert stub.worker_pids() != before
        assert [said["spare"] for said in stub.events() if said["event"] == "worker_started"][:2] == [False, True]
        assert "dvdq_worker_restarts_total" in client.get("/metrics").text


def test_a_broken_gpu_restarts_the_worker_and_a_failing_clip_does_not(stub: ServerProcess) -> None:
    fail = Path(stub.stub["STUB_FAIL"] if stub.stub else "")
    with stub.client() as client:
        stub.wait_ready()
        (pid,) = stub.worker_pids()
        fail.write_text("an operator is not finite")
        state = stub.wait(client, stub.create(client)["id"])
        assert (state["status"], state["dvdquant"]["attempts"]) == ("failed", 2)
        assert state["error"]["code"] == "engine_error"
        assert stub.worker_pids() == [pid]
        fail.write_text("CUDA error: an illegal memory access was encountered")
        made = stub.create(client)["id"]
        end = time.monotonic() + START_SECONDS
        while psutil.pid_exists(pid) and time.monotonic() < end:
            time.sleep(0.05)
        fail.unlink()
        assert not psutil.pid_exists(pid)
        # The job is drawn once more by the next worker, which may read the fault before it is gone.
        state = stub.wait(client, made)
        assert state["dvdquant"]["attempts"] == 2
        assert state["status"] == "completed" or state["error"]["code"] == "engine_error"
        stub.wait_ready()
        assert stub.wait(client, stub.create(client)["id"])["status"] == "completed"


@pytest.mark.stress
def test_twenty_kills_of_each(tmp_path: Path) -> None:
    _kill_rounds(tmp_path, server_kills=20, worker_kills=20)


def _kill_rounds(folder: Path, server_kills: int, worker_kills: int) -> None:
    """Kill server and workers at random moments while jobs come in, then look for every job that was accepted."""
    chance = random.Random(0)
    server = ServerProcess(short_wan_export(), folder / "data", stub=STUB).start()
    accepted: list[str] = []
    finished: dict[str, bytes] = {}
    kinds = ["server"] * server_kills + ["worker"] * worker_kills
    chance.shuffle(kinds)
    for kind in kinds:
        with server.client() as client:
            accepted += [server.create(client, seed=len(accepted), num_inference_steps=4)["id"] for _ in range(4)]
            server.wait(client, accepted[-4])
            finished |= _clips(client, accepted, finished)
            time.sleep(chance.uniform(0, 0.4))
            if kind == "server":
                server.kill()
                server.start()
            else:
                server.kill_workers()
    with server.client() as client:
        states = [server.wait(client, video) for video in accepted]
        assert Counter(state["status"] for state in states) == {"completed": len(accepted)}
        assert max(state["dvdquant"]["attempts"] for state in states) <= 2
        assert _clips(client, list(finished), {}) == finished
        assert len(_clips(client, accepted, {})) == len(accepted)
        listed, after = [], None
        while page := client.get("/v1/videos", params={"limit": 50, **({"after": after} if after else {})}).json()[
            "data"
        ]:
            listed += [video["id"] for video in page]
            after = listed[-1]
        assert sorted(listed) == sorted(accepted)
    assert server.stop() == 0
    assert len(list((folder / "data" / "videos").rglob("*.*"))) == len(accepted)


def _clips(client: httpx.Client, videos: list[str], known: dict[str, bytes]) -> dict[str, bytes]:
    """The clips that are there and not known yet."""
    answers = {video: client.get(f"/v1/videos/{video}/content") for video in videos if video not in known}
    return {video: answer.content for video, answer in answers.items() if answer.status_code == 200}


@pytest.mark.slow
def test_a_stop_drains_and_the_queue_waits_for_the_next_start(tmp_path: Path) -> None:
    options = ("--no-spare", "--api-key-file", tmp_path / "keys")
    (tmp_path / "keys").write_text("# two\n0123456789abcdef\nfedcba9876543210\n")
    key = {"authorization": "Bearer fedcba9876543210"}
    out = Path(shutil.copytree(short_wan_export(), tmp_path / "out"))
    hold = tmp_path / "hold"
    stub = {"STUB_SECONDS": "0.1", "STUB_HOLD": str(hold), **forked_workers()}
    server = ServerProcess(out, tmp_path / "data", *options, stub=stub).start()
    assert server.process is not None
    with server.client() as stranger:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic fedcba9876543210"}):
            answer = stranger.get("/v1/videos", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert stranger.get("/health").status_code == 200
    with server.client(headers=key) as client:
        hold.touch()  # the job runs until all has been asked, however slow the machine is
        running, waiting = (server.create(client, num_inference_steps=3)["id"] for _ in range(2))
        while client.get(f"/v1/videos/{running}").json()["status"] == "queued":
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        refused = _until_draining(client)
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/ready").json()["status"] == "draining"
        assert client.get(f"/v1/videos/{running}").status_code == 200
        hold.unlink()
        assert server.process.wait(START_SECONDS) == 0
    server.start()
    with server.client(headers=key) as client:
        first = client.get(f"/v1/videos/{running}").json()
        assert (first["status"], first["dvdquant"]["attempts"]) == ("completed", 1)
        assert server.wait(client, waiting)["status"] == "completed"
        _reload_goes_on(server, client)
        _next_server_goes_on(server, client, hold)
        with pytest.raises(AssertionError, match="is used by another server"):
            ServerProcess(server.out, server.data).start()
        # The second signal does not wait for the job, which goes back into the queue.
        server.wait_ready()
        long = server.create(client, num_inference_steps=100)["id"]
        while client.get(f"/v1/videos/{long}").json()["status"] == "queued":
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        _until_draining(client)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(START_SECONDS) == 0
    from dvdquant.deploy.serve.store.sqlite_store import SqliteStore

    store = SqliteStore(server.data / "jobs.sqlite")
    job = store.get(long)
    store.close()
    assert job is not None
    assert (job.status, job.attempts) == ("queued", 0)


def _reload_goes_on(server: ServerProcess, client: httpx.Client) -> None:
    """A new export of the same name is taken by the same worker; a broken one is not, and the old one serves."""
    pids = server.worker_pids()
    path = server.out / "manifest.json"
    manifest = json.loads(path.read_text())
    assert server.process is not None
    # The broken one is refused by the server, with a line in its log, and no worker hears of it.
    for change, event in (({"sampling": {"steps": 3}}, "reloaded"), ({"recipe": 7}, "log")):
        begin = server.log_path.stat().st_size
        path.write_text(json.dumps({**manifest, **change}))
        server.process.send_signal(signal.SIGHUP)
        _until_said(server, begin, event)
        body = {"prompt": PROMPT, "guidance_scale": 1}
        state = server.wait(client, client.post("/v1/videos", json=body).json()["id"])
        assert (state["status"], state["dvdquant"]["steps"]) == ("completed", 3)
        assert server.worker_pids() == pids
    path.write_text(json.dumps({**manifest, "sampling": {"steps": 3}}))


def _next_server_goes_on(server: ServerProcess, client: httpx.Client, hold: Path) -> None:
    """The server is killed; the next one finds its worker at work, and the job is neither lost nor begun anew."""
    pids = server.worker_pids()
    hold.touch()
    video = server.create(client, num_inference_steps=5)["id"]
    while not client.get(f"/v1/videos/{video}").json()["dvdquant"]["bits"]:
        time.sleep(0.01)
    server.kill()
    begin = server.log_path.stat().st_size
    server.start()
    _until_said(server, begin, "worker_goes_on")  # the worker's log is that of the new server
    hold.unlink()
    state = server.wait(client, video)
    assert (state["status"], state["dvdquant"]["attempts"], len(state["dvdquant"]["bits"])) == ("completed", 1, 5)
    assert server.worker_pids() == pids
    assert "job_started" not in [event["event"] for event in server.events(begin)]


def _until_said(server: ServerProcess, begin: int, event: str) -> None:
    end = time.monotonic() + START_SECONDS
    while event not in [said["event"] for said in server.events(begin)]:
        assert time.monotonic() < end, server.log_path.read_text()[begin:]
        time.sleep(0.05)


def _until_draining(client: httpx.Client) -> httpx.Response:
    for _ in range(1000):
        answer = client.post("/v1/videos", json={"prompt": BAD_PROMPT})
        if answer.status_code == 503:
            return answer
        time.sleep(0.01)
    raise AssertionError("the server does not drain")


@pytest.mark.slow
def test_two_servers_share_a_queue_in_postgres(tmp_path: Path) -> None:
    """What one of them is asked for the other may draw, and goes on drawing when the first is killed."""
    with postgres() as url:
        servers = [
            ServerProcess(
                short_wan_export(),
                tmp_path / "data",
                "--no-spare",
                stub={"STUB_SECONDS": "0.05", "DVDQ_STORE": url, **forked_workers()},
            ).start()
            for _ in range(2)
        ]
        with servers[0].client() as first, servers[1].client() as second:
            ids = [servers[0].create(first, seed=i, num_inference_steps=5)["id"] for i in range(8)]
            servers[1].wait(second, ids[1])
            workers = servers[0].worker_pids()
            servers[0].kill()
            states = [servers[1].wait(second, video) for video in ids]
            assert {state["status"] for state in states} == {"completed"}
            assert max(state["dvdquant"]["attempts"] for state in states) <= 2
            assert len(_clips(second, ids, {})) == len(ids)
        assert servers[1].stop() == 0
        end = time.monotonic() + START_SECONDS
        while any(map(_lives, workers)) and time.monotonic() < end:
            time.sleep(0.1)  # workers without a server end by themselves
        assert not any(map(_lives, workers))


def _lives(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody asked about does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------------------------------------------------------- load


def test_many_clients_lose_nothing(stub: ServerProcess) -> None:
    _load(stub, clients=8, jobs=24)


@pytest.mark.stress
def test_sixteen_clients_with_two_hundred_jobs(tmp_path: Path) -> None:
    """Two workers share the queue."""
    with ServerProcess(short_wan_export(), tmp_path / "data", "--queue", 6, "--workers", 2, stub=STUB) as server:
        _load(server, clients=16, jobs=200)


def _load(server: ServerProcess, clients: int, jobs: int) -> None:
    """Clients share ``jobs`` jobs, and come again after a 429. Every clip is there once, and is its own."""
    numbers, taken = iter(range(jobs)), threading.Lock()
    ids: dict[int, str] = {}
    sizes: dict[int, int] = {}
    faults: list[str] = []

    def work() -> None:
        with server.client() as client:
            while True:
                with taken:
                    number = next(numbers, None)
                if number is None:
                    return
                body = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1, "seed": number}
                while (answer := client.post("/v1/videos", json=body)).status_code == 429:
                    time.sleep(0.1)
                state = server.wait(client, answer.json()["id"])
                if state["status"] != "completed" or state["dvdquant"]["request"]["seed"] != number:
                    faults.append(str(state))
                ids[number] = state["id"]
                sizes[number] = len(client.get(f"/v1/videos/{state['id']}/content").content)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(set(ids.values())) == jobs
    assert min(sizes.values()) > 500


# ------------------------------------------------------------------------------------ requests that nobody would send


@pytest.mark.slow
def test_requests_made_up_from_the_description(stub: ServerProcess) -> None:
    _made_up(stub, 75)


@pytest.mark.stress
def test_many_requests_made_up_from_the_description(stub: ServerProcess) -> None:
    _made_up(stub, 10_000)


def _made_up(stub: ServerProcess, count: int) -> None:
    """Every answer has a status and a shape that the description names."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'dvdquant[test]'")
    checks = pytest.importorskip("schemathesis.checks")
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    with stub.client() as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    wanted = [checks.not_a_server_error, response_schema_conformance, status_code_conformance]
    statuses: Counter[int] = Counter()

    @given(case=schema.as_strategy())
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        answer = case.call(base_url=stub.url)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ask()
    assert 500 not in statuses
    assert {200, 400, 404} & set(statuses)


@pytest.mark.slow
def test_changed_bytes(stub: ServerProcess) -> None:
    _changed(stub, 400)


@pytest.mark.stress
def test_a_hundred_thousand_changed_bodies(stub: ServerProcess) -> None:
    _changed(stub, 100_000)


def _changed(stub: ServerProcess, count: int) -> None:
    """Every answer is one of the interface's, and in words."""
    with stub.client() as client:
        statuses = changed_bodies(client, count)
        assert client.get("/ready").status_code == 200
    assert statuses[200] > count // 50
    assert statuses[400] > count // 5


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from headless_chromium()


@pytest.mark.slow
def test_the_live_page_draws_a_clip(browser: Any, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    stub = {"STUB_SECONDS": "0", "STUB_HOLD": str(hold), **forked_workers()}
    with ServerProcess(short_wan_export(), tmp_path / "data", "--no-spare", stub=stub) as server:
        with server.client() as client:
            server.wait(client, server.create(client)["id"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on(
            "request", lambda asked: None if asked.url.startswith((server.url, "blob:")) else faults.append(asked.url)
        )
        page.set_default_timeout(60_000)
        try:
            page.goto(server.url)
            _a_clip_is_asked_for_and_shown(page, hold, tmp_path)
            assert faults == []
            page.fill("#prompt", "a cat")
            page.click("#submit")
            page.wait_for_selector("#problem:not([hidden])")
            assert "does not know the word" in page.inner_text("#problem")
            faults.clear()  # the console names the 400, too
            assert page.locator(".card").count() == 2
            page.locator(".card .delete").first.click()
            _until(page, "document.querySelectorAll('.card').length === 1")
            page.set_viewport_size({"width": 390, "height": 844})
            for path in ("/", "/docs"):
                page.goto(server.url + path)
                assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
            assert faults == []
        finally:
            page.close()


def _a_clip_is_asked_for_and_shown(page: Any, hold: Path, folder: Path) -> None:
    """Its cost, then the clip: bars of the steps while it runs, a video at the end."""
    _until(page, "document.querySelector('#prompt').value !== ''")
    page.fill("#num_inference_steps", "20")
    page.fill("#guidance_scale", "1")
    page.fill("#delta", "1")
    page.click("#ask")
    page.wait_for_selector("#plan:not([hidden])")
    assert "20 (20 calls), switch" in page.inner_text("#plan")
    page.fill("#prompt", PROMPT)
    hold.touch()  # the page sees the clip while it runs
    page.click("#submit")
    page.wait_for_selector(".card[data-status=in_progress] .steps i.b8")
    page.screenshot(path=os.environ.get("SERVE_PAGE_RUNNING", str(folder / "running.png")))
    bars = "[...document.querySelector('.card .steps').children].map(bar => bar.className)"
    assert page.evaluate(bars).count("") == 19
    hold.unlink()
    _until(page, "document.querySelector('.card').dataset.status === 'completed'")
    _until(page, "document.querySelector('.card video').readyState >= 2")
    assert page.evaluate("document.querySelector('.card video').videoWidth") == 24
    shown = page.evaluate(bars)
    assert len(shown) == 20
    assert {"b4", "b8"} <= set(shown) <= {"b4", "b8"}
    page.screenshot(path=os.environ.get("SERVE_PAGE_DONE", str(folder / "done.png")))


def _until(page: Any, expression: str) -> None:
    """Wait for an expression; playwright's own way needs eval, which the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        time.sleep(0.1)
    raise AssertionError(f"never: {expression}")
