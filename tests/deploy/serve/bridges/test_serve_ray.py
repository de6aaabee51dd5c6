"""dvdq-serve on Ray: the number of workers follows the queue; a killed worker loses no job.

Ray, Postgres and the object store are real and on this machine; the engine is a stub that sleeps.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from benchmarks.serving.process import PROMPT
from dvdquant.deploy.serve.bridges.queue_policy import QueuePolicy
from dvdquant.deploy.serve.jobs import NewJob
from dvdquant.deploy.serve.settings import EngineSettings, fields_of
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore
from dvdquant.errors import UnsupportedError
from tests.support.exporting import REPOSITORY, TINY_WAN
from tests.support.postgres import postgres
from tests.support.processes import free_port
from tests.support.running import tiny_wan_export
from tests.support.s3 import BUCKET, s3_server

WHAT = NewJob("wan", {"prompt": "a cat"}, 4, (24, 16), 2.0)
PATIENCE = 300.0


def test_the_number_of_workers_follows_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite", keep=60)
    policy = QueuePolicy(jobs_per_worker=2.0, store=store)
    context = SimpleNamespace(target_num_replicas=3)

    # No thread asks the store beside the test, and time stands still.
    idle, now = SimpleNamespace(start=lambda: None, is_alive=lambda: True), [0.0]
    monkeypatch.setattr(f"{QueuePolicy.__module__}.threading", SimpleNamespace(Thread=lambda **_: idle))
    monkeypatch.setattr(f"{QueuePolicy.__module__}.time", SimpleNamespace(monotonic=lambda: now[0]))
    assert policy(context) == (3, {})  # nobody has asked the store: all stays
    policy.look()
    assert policy(context) == (0, {})
    for _ in range(5):
        store.create(WHAT, 10)
    policy.look()
    assert policy(context) == (3, {})
    job = store.claim("w", ("wan",), 60)
    assert job is not None
    policy.look()
    assert policy(context) == (3, {})  # what runs needs its worker
    assert store.complete(job.id, job.token or "", {}, 60, "8")
    policy.look()
    assert policy(context) == (2, {})
    now[0] += 60
    assert policy(context) == (3, {})  # the store has not answered for a minute
    store.close()


def test_arguments_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'dvdquant[serve-ray]'")
    from dvdquant.deploy.serve.ray_app import RayArguments, app

    monkeypatch.delenv("DVDQ_API_KEY", raising=False)
    monkeypatch.delenv("DVDQ_STORE", raising=False)
    with pytest.raises(UnsupportedError, match="DVDQ_API_KEY is not set"):
        app(RayArguments(models="out"))
    with pytest.raises(UnsupportedError, match="DVDQ_STORE is not set"):
        app(RayArguments(models="out", open=True))
    with pytest.raises(UnsupportedError, match="one name"):
        app(RayArguments(models="a/out,b/out", open=True))
    with pytest.raises(UnsupportedError, match="s3_endpoint is for clips in an object store"):
        app(RayArguments(models="out", open=True, s3_endpoint="http://minio:9000"))
    with pytest.raises(ValueError, match="nonsense"):
        RayArguments(models="out", nonsense=1)  # type: ignore[call-arg]


def _of_worker(given: dict[str, str]) -> dict[str, Any]:
    """How a worker runs engines where ``serve run`` has these arguments."""
    from dvdquant.deploy.serve.ray_app import RayArguments

    server = RayArguments.model_validate({"models": "out", "open": "true", **given}).server()
    return fields_of(EngineSettings, server.worker("ray", "cuda:0"))


def test_how_engines_run_reaches_the_workers() -> None:
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'dvdquant[serve-ray]'")
    from dvdquant.deploy.serve.ray_app import RayArguments

    # Each as ``serve run`` gives it, in text; none at its default. Plugins exclude PyTorch, so there are two.
    in_pytorch = {"backend": "pytorch", "compile": "true", "fuse": "false", "cuda_graphs": "true", "weights": "packed"}
    in_pytorch |= {"attention": "fp8", "attention_backend": "cudnn"}
    in_engines = {"backend": "tensorrt", "plugins": "/lib/one.so,/lib/two.so"}
    assert {*in_pytorch, *in_engines} == {each.name for each in dataclasses.fields(EngineSettings)}
    assert _of_worker(in_pytorch) == {
        "backend": "pytorch", "compile": True, "fuse": False, "cuda_graphs": True, "weights": "packed", "plugins": (),
        "attention": "fp8", "attention_backend": "cudnn",
    }  # fmt: skip
    engines = _of_worker(in_engines)
    assert (engines["backend"], engines["plugins"]) == ("tensorrt", ("/lib/one.so", "/lib/two.so"))
    usual = RayArguments(models="out", open=True).server().worker("ray", "cuda:0")
    assert fields_of(EngineSettings, usual) == fields_of(EngineSettings, EngineSettings())
    with pytest.raises(UnsupportedError, match="--compile runs in PyTorch, so --backend rtx does not apply"):
        RayArguments(models="out", open=True, compile=True, backend="rtx").server()
    with pytest.raises(UnsupportedError, match="--plugin is for TensorRT engines, so --backend rtx does not apply"):
        RayArguments(models="out", open=True, plugins=("one.so",), backend="rtx").server()
    with pytest.raises(UnsupportedError, match="--attention-backend runs in PyTorch, so --backend rtx does not apply"):
        RayArguments(models="out", open=True, attention_backend="cudnn", backend="rtx").server()
    with pytest.raises(UnsupportedError, match="unknown attention library 'flash'"):
        RayArguments(models="out", open=True, attention_backend="flash").server()
    with pytest.raises(UnsupportedError, match="'cudnn' computes 8-bit attention, and attention is in 16 bit here"):
        RayArguments(models=f"wan={tiny_wan_export()}", open=True, attention_backend="cudnn").server()
    with pytest.raises(UnsupportedError, match="as they were built, so --weights packed does not apply"):
        RayArguments(models="out", open=True, weights="packed", backend="rtx").server()
    with pytest.raises(ValueError, match="backend"):
        RayArguments.model_validate({"models": "out", "backend": "onnx"})
    with pytest.raises(ValueError, match="int4"):
        RayArguments.model_validate({"models": "out", "attention": "int4"})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray of one node with the application, workers between one and two."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'dvdquant[serve-ray]'")
    from ray import serve

    from benchmarks.serving.stub_worker import StubSession
    from dvdquant.deploy.serve.ray_app import RayArguments, bind_app

    folder = tmp_path_factory.mktemp("ray")
    port = free_port()
    with postgres() as store, s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "DVDQ_STORE": store,
            "STUB_SECONDS": "0.1",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "240",  # of a busy machine
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # 15 if it is not said: a replica beside other work then starts for minutes
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }.items():
            patch.setenv(name, value)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            args = RayArguments(
                models=f"wan={tiny_wan_export()}", pipeline=str(TINY_WAN), files=f"s3://{BUCKET}/ray",
                s3_endpoint=endpoint, data=str(folder / "data"), min_workers=1, max_workers=2, up_seconds=0.5,
                down_seconds=4, gpus=0, cpus=0.5, open=True, backend="onnxruntime", drain_seconds=60, warm_up=False,
            )  # fmt: skip
            serve.run(bind_app(args, StubSession), name="dvdq", blocking=False)  # type: ignore[arg-type]
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", serve=serve, store=store)
            serve.shutdown()
        finally:
            ray.shutdown()


def _until(what: Any, said: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, said
        time.sleep(0.2)
    return found


@pytest.mark.stress  # a cluster on two busy cores takes minutes
def test_two_replicas_of_which_one_is_killed_complete_every_job(cluster: Any) -> None:
    """The queue brings a second worker; it is killed in a job; all jobs complete; then one worker is left."""
    from dvdquant.deploy.serve.store.postgres_store import PostgresStore

    def running() -> int:
        states = cluster.serve.status().applications["dvdq"].deployments["workers"].replica_states
        return int(states.get("RUNNING", 0))

    store = PostgresStore(cluster.store)
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        _until(lambda: client.get("/ready").status_code == 200, "no worker is ready")
        assert running() == 1
        body = {"prompt": PROMPT, "num_inference_steps": 40, "guidance_scale": 1}
        made: list[str] = []

        def ask(count: int) -> None:
            made.extend(
                client.post("/v1/videos", json={**body, "seed": len(made) + i}).json()["id"] for i in range(count)
            )

        ask(10)
        bad = client.post("/v1/videos", json={"prompt": "nonsense here"})
        assert (bad.status_code, bad.json()["error"]["type"]) == (400, "invalid_request_error")

        def workers() -> dict[str, str]:
            if store.counts().get("queued", 0) < 4:
                ask(4)  # a replica takes long to start on a busy machine, and must find something to draw
            held = (store.get(video) for video in made)
            return {job.worker: job.id for job in held if job and job.status == "in_progress" and job.worker}

        held = _until(lambda: len(w := workers()) == 2 and w, "no second worker came")
        killed = max(held, key=lambda name: int(name.split("-")[1]))
        os.kill(int(killed.split("-")[1]), signal.SIGKILL)
        ask(4)

        def ended() -> list[Any]:
            jobs = [client.get(f"/v1/videos/{video}").json() for video in made]
            return jobs if all(job["status"] in ("completed", "failed") for job in jobs) else []

        jobs = {job["id"]: job for job in _until(ended, "a job did not end")}
        assert {job["status"] for job in jobs.values()} == {"completed"}
        attempts = {video: job["dvdquant"]["attempts"] for video, job in jobs.items()}
        assert attempts.pop(held[killed]) == 2
        assert set(attempts.values()) == {1}
        clip = client.get(f"/v1/videos/{made[0]}/content")
        part = client.get(f"/v1/videos/{made[0]}/content", headers={"range": "bytes=4-11"})
        assert (part.status_code, part.content) == (206, clip.content[4:12])
        assert clip.content[4:8] == b"ftyp"
        _until(lambda: running() == 1, "the number of workers did not fall")
        assert "dvdq_jobs" in client.get("/metrics").text
        assert client.delete(f"/v1/videos/{made[0]}").status_code == 200
        assert client.get(f"/v1/videos/{made[0]}/content").status_code == 404
    store.close()
