"""Measure dvdq-serve: what HTTP and queue cost, clips a second, recovery from kills, cancels, memory, hostile bodies.

    python -m benchmarks.serving OUT                 all, as a table; OUT is an export of examples/tiny-wan
    python -m benchmarks.serving OUT --only overhead,growth --requests 200
    python -m benchmarks.serving OUT --save          ... and write the table of docs/serving.md

The engine is a stub that sleeps 5 ms a call, behind the product's worker; everything else is what runs in production. The cost
of the interface is paired: the same clip by turns through the server and by ``generate`` and ``write_mp4`` in this process, with
the same stub.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serving.fuzz import changed_bodies
from benchmarks.serving.process import PROMPT, TINY_WAN, ServerProcess
from benchmarks.serving.results import machine, save

CALL = "0.005"
POLL = 0.002  # seconds between two looks of the client that is timed
Row = tuple[str, str, str]


def overhead(out: Path, folder: Path, requests: int) -> list[Row]:
    """Time a clip through the server against the same in Python, by turns; the client waits with ``?wait=``."""
    from benchmarks.serving.stub_worker import StubSession
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
    from dvdquant.deploy.generation.video import write_mp4

    os.environ["STUB_SECONDS"] = CALL
    wall: dict[str, list[float]] = {"served": [], "plain": [], "created": [], "fetched": []}
    spent: dict[str, list[float]] = {"served": [], "plain": []}
    options: dict[str, Any] = {
        "pipeline": TINY_WAN,
        "backend": "onnxruntime",
        "device": "cpu",
        "wrap_session": StubSession,
    }
    with (
        ServerProcess(out, folder / "data", "--no-spare", stub={"STUB_SECONDS": CALL}) as server,
        server.client() as client,
        open_generator(Artifact.open(out), **options) as generator,
    ):
        assert server.process is not None
        pids = (server.process.pid, *server.worker_pids())
        for i in range(requests + 5):
            before, begin = _cpu(pids), time.perf_counter()
            made = server.create(client, seed=i)
            accepted = time.perf_counter()
            state = client.get(f"/v1/videos/{made['id']}", params={"wait": 60}).json()
            assert state["status"] == "completed", state
            done = time.perf_counter()
            client.get(f"/v1/videos/{made['id']}/content").raise_for_status()
            middle = time.perf_counter()
            between, own = _cpu(pids), _own_cpu()
            result = generator.generate(GenerateRequest(PROMPT, steps=2, guidance=1, seed=i))
            write_mp4(folder / "plain.mp4", result.frames, generator.fps(len(result.frames)))
            end = time.perf_counter()
            if i < 5:
                continue
            spent["served"].append(between - before)
            spent["plain"].append(_own_cpu() - own)
            wall["created"].append(accepted - begin)
            wall["fetched"].append(middle - done)
            wall["served"].append(middle - begin)
            wall["plain"].append(end - middle)
    paired = [a - b for a, b in zip(wall["served"], wall["plain"])]
    cpu = 1000 * (statistics.mean(spent["served"]) - statistics.mean(spent["plain"]))
    return [
        (f"one clip through the server, median of {requests}", f"{_ms(wall['served'])} ms", ""),
        ("the same in Python, median", f"{_ms(wall['plain'])} ms", ""),
        ("HTTP, queue and worker above Python, paired median", f"{_ms(paired)} ms", "20 ms"),
        ("the same in processor time of server, worker and encoder, mean", f"{cpu:.1f} ms", ""),
        ("of it create, fetching the clip, medians", f"{_ms(wall['created'])} ms, {_ms(wall['fetched'])} ms", ""),
    ]


def _cpu(pids: tuple[int, ...]) -> float:
    """Processor seconds of processes, and of their children that have ended."""
    return sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in pids)


def _own_cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


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
        (
            f"cancel to stopped, calls of 50 ms, median of {requests} (most)",
            f"{_ms(times)} ms ({1000 * max(times):.0f} ms)",
            "one call, 50 ms",
        )
    ]


def kills(out: Path, folder: Path, requests: int) -> list[Row]:
    """Kill worker and server by turns with SIGKILL, ``requests`` times each, at random moments while jobs come in."""
    chance = random.Random(0)
    times: dict[str, list[float]] = {"worker": [], "server": []}
    accepted: list[str] = []
    finished: dict[str, bytes] = {}
    kinds = ["worker", "server"] * requests
    chance.shuffle(kinds)
    server = ServerProcess(out, folder / "data", "--queue", 1000, stub={"STUB_SECONDS": "0.02"}).start()
    for i, kind in enumerate(kinds):
        with server.client() as client:
            accepted += [server.create(client, seed=4 * i + j, num_inference_steps=4)["id"] for j in range(4)]
            server.wait(client, accepted[-4])
            finished[accepted[-4]] = client.get(f"/v1/videos/{accepted[-4]}/content").content
            time.sleep(chance.uniform(0, 0.6))
        begin = time.perf_counter()
        if kind == "worker":
            server.kill_workers()
        else:
            server.kill()
            server.start()
        times[kind].append(time.perf_counter() - begin)
    with server.client() as client:
        states = [server.wait(client, video) for video in accepted]
        there = {video: client.get(f"/v1/videos/{video}/content").content for video in accepted}
    server.stop()
    done = sum(state["status"] == "completed" for state in states)
    attempts = Counter(state["dvdquant"]["attempts"] for state in states)
    lost = sum(there[video] != clip for video, clip in finished.items())
    reasons = Counter(state["error"]["code"] for state in states if state["error"])
    return [
        (
            f"{requests} kill -9 of the worker and {requests} of the server: jobs that were accepted",
            str(len(accepted)),
            "",
        ),
        ("of them completed", f"{done}" + (f" ({dict(reasons)})" if reasons else ""), "all"),
        ("finished clips that changed or went", str(lost), "0"),
        ("jobs by attempts", ", ".join(f"{n} with {k}" for k, n in sorted(attempts.items())), "at most 2"),
        ("worker killed, until jobs are drawn again", _spread(times["worker"]), "15 s"),
        ("server killed and started, until jobs are drawn again", _spread(times["server"]), "15 s"),
    ]


def spare(out: Path, folder: Path, requests: int) -> list[Row]:
    """Kill the worker whenever the spare process is ready, and time until jobs are drawn."""
    times = []
    with ServerProcess(out, folder / "data", stub={"STUB_SECONDS": CALL}) as server:
        for i in range(requests):
            end = time.monotonic() + 240
            while sum(event["event"] == "spare_ready" for event in server.events()) <= i and time.monotonic() < end:
                time.sleep(0.1)
            begin = time.perf_counter()
            server.kill_workers()
            times.append(time.perf_counter() - begin)
    return [("worker killed while the spare process is ready, until jobs are drawn again", _spread(times), "15 s")]


def cold(out: Path, folder: Path, requests: int) -> list[Row]:
    """Kill server, worker and spare process at once, as a container ends, and time the start."""
    times, first = [], []
    server = ServerProcess(out, folder / "data", stub={"STUB_SECONDS": CALL}).start()
    for _ in range(requests):
        assert server.process is not None
        family = [server.process, *psutil.Process(server.process.pid).children()]
        for process in family:
            process.kill()
        server.process.wait()
        begin = time.perf_counter()
        server.start(ready=False)
        first.append(time.perf_counter() - begin)
        server.wait_ready()
        times.append(time.perf_counter() - begin)
    server.stop()
    return [
        ("everything killed and started: HTTP answers, jobs are accepted", _spread(first), ""),
        ("everything killed and started: jobs are drawn", _spread(times), "15 s"),
    ]


def limits(out: Path, folder: Path, requests: int) -> list[Row]:
    """Ask for more than the queue takes, then stop the server while it works."""
    with ServerProcess(
        out, folder / "data", "--queue", 8, "--max-steps", 1000, "--no-spare", stub={"STUB_SECONDS": "0.05"}
    ) as server:
        with server.client() as client:
            blocker = server.create(client, num_inference_steps=900)["id"]
            while client.get(f"/v1/videos/{blocker}").json()["status"] == "queued":
                time.sleep(POLL)
            body = {"prompt": PROMPT, "num_inference_steps": 1, "guidance_scale": 1}
            answers = [client.post("/v1/videos", json=body) for _ in range(requests)]
            full = [answer for answer in answers if answer.status_code == 429]
            retries = [int(answer.headers["retry-after"]) for answer in full]
            client.post(f"/v1/videos/{blocker}/cancel")
            server.wait(client, blocker)
            server.wait(client, answers[0].json()["id"])
            running = server.create(client, num_inference_steps=100)["id"]
            while client.get(f"/v1/videos/{running}").json()["status"] == "queued":
                time.sleep(POLL)
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            while (draining := client.post("/v1/videos", json=body)).status_code == 200:
                time.sleep(POLL)
            wait = draining.headers["retry-after"]
        code = server.process.wait(240)
    return [
        (
            f"{requests} jobs for a queue of 8",
            f"{len(answers) - len(full)} accepted, {len(full)} answered 429, all with Retry-After ({min(retries)} s or more)",
            "8 accepted",
        ),
        ("a job while the server stops", f"{draining.status_code}, Retry-After {wait} s; exit code {code}", "503"),
    ]


def fuzz(out: Path, folder: Path, requests: int) -> list[Row]:
    """Send bodies with changed bytes to create and preflight; jobs that are good wait, and nobody draws them."""
    from benchmarks.serving.local import local_http
    from dvdquant.deploy.serve.settings import Limits, ModelSource, ServerSettings

    settings = ServerSettings(
        (ModelSource("out", str(out), str(TINY_WAN)),),
        folder / "data",
        devices=(),
        spare=False,
        limits=Limits(queue=1000),
    )
    with local_http(settings) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        statuses = changed_bodies(client, requests)
        assert client.get("/health").status_code == 200
    said = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
    return [(f"{requests} bodies with changed bytes: answers", said, "no 500")]


def growth(out: Path, folder: Path, requests: int) -> list[Row]:
    """Resident memory of server and worker after 50 requests and at the end."""
    seen: list[tuple[float, float]] = []
    with (
        ServerProcess(out, folder / "data", "--no-spare", stub={"STUB_SECONDS": "0"}) as server,
        server.client() as client,
    ):
        assert server.process is not None
        pids = (server.process.pid, *server.worker_pids())
        for i in range(requests):
            mode = ("switch", "a4", "a8")[i % 3]
            made = server.create(client, seed=i, mode=mode)["id"]
            assert client.get(f"/v1/videos/{made}", params={"wait": 60}).json()["status"] == "completed"
            client.get("/v1/videos")
            client.post("/v1/videos", json={"prompt": f"nonsense {i}"})
            if i in (49, requests - 1):
                seen.append(tuple(psutil.Process(pid).memory_info().rss / 2**20 for pid in pids))
    names = ("server", "worker")
    return [
        (
            f"memory of the {name} from the 50th to the {requests}th request",
            f"{seen[0][i]:.1f} to {seen[1][i]:.1f} MiB",
            "10 MiB more",
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
    "limits": (limits, 30),
    "cancels": (cancels, 20),
    "kills": (kills, 20),
    "spare": (spare, 5),
    "cold": (cold, 5),
    "growth": (growth, 1000),
    "fuzz": (fuzz, 100_000),
}


def _ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}"


def _spread(seconds: list[float]) -> str:
    return (
        f"median {statistics.median(seconds):.1f} s, most {max(seconds):.1f} s, {len(seconds)} times"
        if seconds
        else "-"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(MEASURES), help="some of: " + ", ".join(MEASURES))
    parser.add_argument("--requests", type=int, help="instead of each measure's own number")
    parser.add_argument("--save", action="store_true", help="keep the figures, and write the table of docs/serving.md")
    options = parser.parse_args()
    print("| what | figure | wanted |\n| --- | --- | --- |", flush=True)
    for name in options.only.split(","):
        measure, usual = MEASURES[name]
        where = machine()
        requests = options.requests or usual
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(options.out, Path(folder), requests)
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)
        if options.save:
            save(name, where, f"--only {name} --requests {requests}", rows)


if __name__ == "__main__":
    main()
