"""Measure dvdq-serve: what HTTP and queue cost, clips a second, recovery from kills, cancels, memory.

    python -m benchmarks.serving OUT                 all, as a table; OUT is an export of examples/tiny-wan
    python -m benchmarks.serving OUT --only overhead,growth --requests 200

The engine is a stub that sleeps 5 ms a call, behind the product's worker; everything else is what runs in production. The cost
of the interface is paired: the same clip by turns through the server and by ``generate`` and ``write_mp4`` in this process, with
the same stub.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from benchmarks.serving.process import PROMPT, TINY_WAN, ServerProcess

CALL = "0.005"
POLL = 0.002  # seconds between two looks of the client that is timed
Row = tuple[str, str, str]


def overhead(out: Path, folder: Path, requests: int) -> list[Row]:
    """Time a clip through the server against the same in Python, by turns."""
    from benchmarks.serving.stub_worker import StubSession
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
    from dvdquant.deploy.generation.video import write_mp4

    os.environ["STUB_SECONDS"] = CALL
    served: list[float] = []
    plain: list[float] = []
    created: list[float] = []
    options = {"pipeline": TINY_WAN, "backend": "onnxruntime", "device": "cpu", "wrap_session": StubSession}
    with (
        ServerProcess(out, folder / "data", stub={"STUB_SECONDS": CALL}) as server,
        server.client() as client,
        open_generator(Artifact.open(out), **options) as generator,
    ):
        for i in range(requests + 5):
            begin = time.perf_counter()
            made = server.create(client, seed=i)
            accepted = time.perf_counter()
            while client.get(f"/v1/videos/{made['id']}").json()["status"] != "completed":
                time.sleep(POLL)
            client.get(f"/v1/videos/{made['id']}/content").raise_for_status()
            middle = time.perf_counter()
            result = generator.generate(GenerateRequest(PROMPT, steps=2, guidance=1, seed=i))
            write_mp4(folder / "plain.mp4", result.frames, generator.fps(len(result.frames)))
            end = time.perf_counter()
            if i >= 5:
                created.append(accepted - begin)
                served.append(middle - begin)
                plain.append(end - middle)
    paired = [a - b for a, b in zip(served, plain)]
    return [
        ("one clip through the server, median", f"{_ms(served)} ms", f"in Python {_ms(plain)} ms"),
        ("HTTP, queue and worker above Python, paired median", f"{_ms(paired)} ms", "<= 20 ms"),
        ("create, median", f"{_ms(created)} ms", ""),
    ]


def throughput(out: Path, folder: Path, requests: int) -> list[Row]:
    """Send jobs from 16 clients to one worker with a queue of 8."""
    numbers, lock = iter(range(requests)), threading.Lock()
    times: list[float] = []
    ids: set[str] = set()
    refused = [0]

    def work(server: ServerProcess) -> None:
        with server.client() as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                begin = time.perf_counter()
                body = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1, "seed": number}
                while (answer := client.post("/v1/videos", json=body)).status_code == 429:
                    refused[0] += 1
                    time.sleep(0.2)
                state = server.wait(client, answer.json()["id"])
                if state["status"] == "completed":
                    ids.add(state["id"])
                times.append(time.perf_counter() - begin)

    with ServerProcess(out, folder / "data", "--queue", 8, stub={"STUB_SECONDS": CALL}) as server:
        threads = [threading.Thread(target=work, args=(server,)) for _ in range(16)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
    times.sort()
    lost = requests - len(ids)
    return [
        (f"16 clients, {requests} jobs, queue of 8", f"{requests / seconds:.1f} clips/s, {lost} lost", "0 lost"),
        ("their latency", f"median {statistics.median(times):.2f} s, p95 {times[int(0.95 * len(times))]:.2f} s", ""),
        ("answers 429 that they waited for", str(refused[0]), ""),
    ]


def cancels(out: Path, folder: Path, requests: int) -> list[Row]:
    """Time from the cancel of a running job to its end, with calls of 50 ms."""
    times = []
    with (
        ServerProcess(out, folder / "data", "--max-steps", 1000, stub={"STUB_SECONDS": "0.05"}) as server,
        server.client() as client,
    ):
        for i in range(requests):
            made = server.create(client, num_inference_steps=900, seed=i)
            while not client.get(f"/v1/videos/{made['id']}").json()["dvdquant"]["bits"]:
                time.sleep(POLL)
            begin = time.perf_counter()
            client.post(f"/v1/videos/{made['id']}/cancel")
            while client.get(f"/v1/videos/{made['id']}").json()["status"] != "failed":
                time.sleep(POLL)
            times.append(time.perf_counter() - begin)
    return [
        ("cancel to stopped, calls of 50 ms", f"median {_ms(times)} ms, most {1000 * max(times):.0f} ms", "one call")
    ]


def kills(out: Path, folder: Path, requests: int) -> list[Row]:
    """Kill worker and server with SIGKILL at random moments, and time until jobs are drawn again."""
    chance = random.Random(0)
    worker_times, server_times = [], []
    accepted: list[str] = []
    server = ServerProcess(out, folder / "data", stub={"STUB_SECONDS": "0.02"}).start()
    for i in range(requests):
        with server.client() as client:
            accepted += [server.create(client, seed=i, num_inference_steps=4)["id"] for _ in range(4)]
            time.sleep(chance.uniform(0, 0.6))
            if i % 2:
                begin = time.perf_counter()
                server.kill_workers()
                worker_times.append(time.perf_counter() - begin)
            else:
                server.kill()
                begin = time.perf_counter()
                server.start()
                server_times.append(time.perf_counter() - begin)
    with server.client() as client:
        states = [server.wait(client, video) for video in accepted]
        there = [client.get(f"/v1/videos/{video}/content").status_code == 200 for video in accepted]
    server.stop()
    done = sum(state["status"] == "completed" for state in states)
    attempts = max(state["dvdquant"]["attempts"] for state in states)
    reasons = sorted(state["error"]["code"] for state in states if state["error"])
    return [
        (f"{requests} kills -9, {len(accepted)} jobs", f"{done} completed, {sum(there)} clips there", "all"),
        ("attempts at a job, most", str(attempts), "<= 2"),
        ("reasons of those that failed (two kills hit a job: worker_lost)", ", ".join(reasons) or "-", ""),
        ("worker killed, until jobs are drawn again", _spread(worker_times), "<= 15 s"),
        ("server killed and started, until jobs are drawn again", _spread(server_times), "<= 15 s"),
    ]


def growth(out: Path, folder: Path, requests: int) -> list[Row]:
    """Resident memory of server and worker after 50 requests and at the end."""
    seen: list[tuple[float, float]] = []
    with ServerProcess(out, folder / "data", stub={"STUB_SECONDS": "0"}) as server, server.client() as client:
        assert server.process is not None
        pids = (server.process.pid, *server.worker_pids())
        for i in range(requests):
            mode = ("switch", "a4", "a8")[i % 3]
            server.wait(client, server.create(client, seed=i, mode=mode)["id"])
            client.get("/v1/videos")
            client.post("/v1/videos", json={"prompt": f"nonsense {i}"})
            if i in (49, requests - 1):
                seen.append(tuple(psutil.Process(pid).memory_info().rss / 2**20 for pid in pids))  # type: ignore[arg-type]
    names = ("server", "worker")
    return [
        (
            f"memory of the {name} from the 50th to the {requests}th request",
            f"{seen[0][i]:.1f} to {seen[1][i]:.1f} MiB",
            "<= 10 MiB more",
        )
        for i, name in enumerate(names)
    ]


def start(out: Path, folder: Path, requests: int) -> list[Row]:
    """Time a cold start, and look at the memory of the HTTP process."""
    del requests
    begin = time.perf_counter()
    with ServerProcess(out, folder / "data", stub={"STUB_SECONDS": CALL}) as server:
        seconds = time.perf_counter() - begin
        assert server.process is not None
        resident = psutil.Process(server.process.pid).memory_info().rss / 2**20
    return [
        ("cold start until jobs are drawn", f"{seconds:.1f} s", ""),
        ("memory of the HTTP process", f"{resident:.0f} MiB", ""),
    ]


MEASURES: dict[str, tuple[Callable[[Path, Path, int], list[Row]], int]] = {
    "start": (start, 1),
    "overhead": (overhead, 60),
    "throughput": (throughput, 200),
    "cancels": (cancels, 20),
    "kills": (kills, 40),
    "growth": (growth, 1000),
}


def _ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}"


def _spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.1f} s, most {max(seconds):.1f} s" if seconds else "-"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(MEASURES), help="some of: " + ", ".join(MEASURES))
    parser.add_argument("--requests", type=int, help="instead of each measure's own number")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before\n"
    )
    print("| what | figure | wanted |\n| --- | --- | --- |", flush=True)
    for name in options.only.split(","):
        measure, usual = MEASURES[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows = measure(options.out, Path(folder), options.requests or usual)
            except httpx.HTTPError as error:
                rows = [(name, f"failed: {error!r}", "")]
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
