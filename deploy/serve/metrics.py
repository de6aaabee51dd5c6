"""Figures of the server for Prometheus. All are made at the start, because two threads may count the same one first."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["CLIP_SECONDS", "STEP_SECONDS", "ServerMetrics"]

STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
CLIP_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)


class ServerMetrics:
    """The figures, and what the events of the workers change in them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(registry=self.registry)
        self.requests = Counter("dvdq_http_requests", "HTTP requests", ["method", "route", "status"], **kept)
        self.request_seconds = Histogram(
            "dvdq_http_seconds", "Time of an HTTP request", ["route"], buckets=STEP_SECONDS, **kept
        )
        self.jobs = Gauge("dvdq_jobs", "Jobs in the store", ["status"], **kept)
        self.waited = Histogram(
            "dvdq_wait_seconds", "From the creation of a job to its start", buckets=CLIP_SECONDS, **kept
        )
        self.steps = Histogram(
            "dvdq_step_seconds", "One call of the transformer", ["model", "bits"], buckets=STEP_SECONDS, **kept
        )
        self.skipped = Counter("dvdq_steps_skipped", "Calls that reused an earlier output", ["model"], **kept)
        self.retried = Counter(
            "dvdq_step_retries", "Calls that failed and ran again on the high engine", ["model"], **kept
        )
        self.clips = Counter("dvdq_clips", "Attempts that ended", ["model", "status"], **kept)
        self.clip_seconds = Histogram("dvdq_clip_seconds", "Drawing a clip", ["model"], buckets=CLIP_SECONDS, **kept)
        self.encode_seconds = Histogram("dvdq_encode_seconds", "Encoding a clip", buckets=CLIP_SECONDS, **kept)
        self.resident = Gauge("dvdq_worker_resident_bytes", "Memory of a worker process", ["worker"], **kept)
        self.device = Gauge("dvdq_worker_device_bytes", "Memory of a worker on its GPU", ["worker"], **kept)
        self.ready = Gauge("dvdq_worker_ready", "1 if the worker takes jobs", ["worker"], **kept)
        self.restarts = Counter("dvdq_worker_restarts", "Worker processes that were started again", ["worker"], **kept)

        self.stuck = Counter("dvdq_undeleted_clips", "Tries to delete an expired clip that the disk refused", **kept)
        self.reload_failures = Counter(
            "dvdq_reload_failures", "Exports that could not be opened anew", ["model"], **kept
        )

    def take(self, worker: str, message: dict[str, Any]) -> None:
        """Count an event of a worker.

        Args:
            worker: The label of the worker, such as its device.
            message: The event, see :mod:`.worker`.
        """
        kind, model = message["event"], message.get("model", "")
        if kind == "started":
            self.waited.observe(message["waited"])
        elif kind == "step":
            if message["bits"] == "skip":
                self.skipped.labels(model).inc()
            else:
                self.steps.labels(model, message["bits"]).observe(message["seconds"])
            if message["retried"]:
                self.retried.labels(model).inc()
        elif kind == "ended":
            self.clips.labels(model, message["status"]).inc()
            if message["status"] == "completed":
                self.clip_seconds.labels(model).observe(message["seconds"])
                self.encode_seconds.observe(message["encode_seconds"])
        elif kind == "reload_failed":
            self.reload_failures.labels(model).inc()
        if "resident_bytes" in message:
            self.resident.labels(worker).set(message["resident_bytes"])
        if "device_bytes" in message:
            self.device.labels(worker).set(message["device_bytes"])

    def text(self, counts: dict[str, int]) -> bytes:
        """Return all figures in the format of Prometheus.

        Args:
            counts: The number of jobs in each status.
        """
        for status in ("queued", "in_progress", "completed", "failed"):
            self.jobs.labels(status).set(counts.get(status, 0))
        return generate_latest(self.registry)

    def step_means(self, model: str) -> dict[str, float]:
        """Return the mean seconds of a call by bits, as measured so far.

        Args:
            model: The name of the model.
        """
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for metric in self.steps.collect():
            for sample in metric.samples:
                if sample.labels.get("model") == model:
                    kind = {"dvdq_step_seconds_sum": sums, "dvdq_step_seconds_count": counts}.get(sample.name)
                    if kind is not None:
                        kind[sample.labels["bits"]] = sample.value
        return {bits: sums[bits] / count for bits, count in counts.items() if count}

    def clip_mean(self) -> float:
        """Return the mean seconds of a clip so far; 0 before the first."""
        samples = [s for metric in self.clip_seconds.collect() for s in metric.samples]
        count = sum(s.value for s in samples if s.name.endswith("_count"))
        return sum(s.value for s in samples if s.name.endswith("_sum")) / count if count else 0.0
