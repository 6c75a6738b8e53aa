"""The teacher's Prometheus metrics. Numbers that its parts count anyway are read from them at each scrape.

Jobs are a label. Their names come from clients, so only the MAX_JOBS that called last have series: the others' end, and
begin at 0 when the job returns, which Prometheus treats as a restart. The label isn't called `job`, since Prometheus
adds a label of that name itself.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vaopd_teacher.engines.engine import EngineResult
from vaopd_teacher.line.admission import Admission
from vaopd_teacher.line.scheduler import Scheduler

MAX_JOBS = 100
JOB = "vaopd_job"
LABEL_CHARACTERS = 64
LATENCY_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 2, 5, 10, 20, 30, 60, 120, 300)
FILL_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
VA_BUCKETS_NATS = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Cache(Protocol):
    """The counters of one of the teacher's stores; may be read from any thread."""

    hits: int
    misses: int
    dropped: int
    """Entries that had to make room."""
    size_bytes: int
    capacity_bytes: int


class Server(Protocol):
    """The parts of the server that a scrape reads."""

    serving: bool
    """Whether health checks are answered with SERVING."""
    admission: Admission
    scheduler: Scheduler
    caches: dict[str, Cache]
    """The stores by the kind of their entries."""


class TeacherMetrics:
    """The registry and its counters; used from the event loop and the device's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._jobs: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._lock = threading.Lock()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vaopd_teacher_{name}", text, labels, registry=self.registry)

        self._groups = counter("groups", "Prompt groups that were scored", JOB)
        self._tokens = counter("tokens", "Tokens that were computed for them, prompts once in each view", JOB)
        self._failed = counter("failed_groups", "Groups refused by themselves, in calls that were answered", JOB)
        self._refused = counter(
            "refused_calls",
            "Calls that were refused as a whole, by reason: queue_full, quota, or the gRPC status in small letters; "
            "calls that no job is known of have the job -",
            JOB,
            "reason",
        )
        self._latency = Histogram(
            "vaopd_teacher_group_latency_seconds",
            "Time from a call's arrival to the answer of each of its groups",
            [JOB],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._advantage = Histogram(
            "vaopd_teacher_rollout_visual_advantage_nats",
            "Mean visual advantage of each scored rollout",
            [JOB],
            buckets=VA_BUCKETS_NATS,
            registry=self.registry,
        )
        self._fill = Histogram(
            "vaopd_teacher_batch_fill_ratio",
            "Tokens in a batch for the device over teacher.batch_tokens; above 1 it takes several forwards",
            buckets=FILL_BUCKETS,
            registry=self.registry,
        )
        self._state = _AtScrape(self._list_jobs)
        self.registry.register(self._state)

    def watch(self, server: Server) -> None:
        """Lets scrapes read the parts of a server from now on."""
        self._state.server = server

    def count_scored(self, job: str, scored: EngineResult, *, latency_s: float) -> None:
        """Counts a scored group, `latency_s` after its call's arrival."""
        job, group = self._see_job(job), scored.group
        self._groups.labels(job).inc()
        self._tokens.labels(job).inc(group.tokens)
        self._latency.labels(job).observe(latency_s)
        ends = np.cumsum([len(ids) for ids in group.responses])[:-1]
        for advantage in np.split(scored.columns["visual_advantage"], ends):
            self._advantage.labels(job).observe(float(advantage.mean()))

    def count_failed(self, job: str) -> None:
        """Counts a group that was answered with an error."""
        self._failed.labels(self._see_job(job)).inc()

    def count_refused(self, job: str | None, reason: str) -> None:
        """Counts a call that was refused as a whole; `job`: None when it is not known."""
        self._refused.labels(self._see_job(job) if job else "-", reason).inc()

    def observe_batch(self, fill: float) -> None:
        """Notes a batch for the device, as its share of `teacher.batch_tokens`."""
        self._fill.observe(fill)

    def _list_jobs(self) -> list[str]:
        with self._lock:
            return list(self._jobs)

    def _see_job(self, job: str) -> str:
        """Returns a job's label; ends the series of the job that has been silent for longest to make room."""
        job = job[:LABEL_CHARACTERS]
        with self._lock:
            if job not in self._jobs:
                self._failed.labels(job)  # so that the first one is an increase
            self._jobs[job] = None
            self._jobs.move_to_end(job)
            if len(self._jobs) <= MAX_JOBS:
                return job
            silent, _ = self._jobs.popitem(last=False)
        for metric in (self._groups, self._tokens, self._failed, self._refused, self._latency, self._advantage):
            metric.remove_by_labels({JOB: silent})
        return job


class _AtScrape(Collector):
    """Reads the server's parts at each scrape. A teacher that still loads has only `serving`, which is 0."""

    def __init__(self, jobs: Callable[[], list[str]]) -> None:
        """`jobs` returns the labels of jobs with other series: their queues are shown when empty, too."""
        self.server: Server | None = None
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics of one scrape."""

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"vaopd_teacher_{name}", text, labels=labels)

        def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"vaopd_teacher_{name}", text, labels=labels)

        serving = gauge("serving", "1 while calls are taken; 0 while it loads, drains or has failed")
        limit = gauge("queue_limit_groups", "Groups of all jobs that may be accepted and unanswered")
        groups = gauge("queue_groups", "Groups that are accepted and not yet answered", JOB)
        tokens = gauge("queue_tokens", "Tokens of those that are prepared and wait for the device", JOB)
        batches = counter("batches", "Batches that went to the device")
        busy = counter("device_busy_seconds", "Time that the device's thread spent on finished batches")
        hits = counter("cache_hits", "Found in a cache: encoded images, prepared views, vision outputs", "cache")
        misses = counter("cache_misses", "Not found, hence sent, prepared or computed again", "cache")
        dropped = counter("cache_dropped", "Entries that had to make room", "cache")
        size = gauge("cache_bytes", "What a cache holds", "cache")
        capacity = gauge("cache_capacity_bytes", "What it may hold, by the service's configuration", "cache")
        server = self.server
        serving.add_metric([], float(server is not None and server.serving))
        if server is not None:
            limit.add_metric([], server.admission.limit)
            empty = dict.fromkeys(self._jobs(), 0.0)
            for job, count in (empty | _sum_by_label(server.admission.count_waiting_by_job())).items():
                groups.add_metric([job], count)
            for job, cost in (empty | _sum_by_label(server.scheduler.waiting_tokens_by_job())).items():
                tokens.add_metric([job], cost)
            batches.add_metric([], server.scheduler.forwards)
            busy.add_metric([], server.scheduler.busy_seconds)
            for name, cache in server.caches.items():
                hits.add_metric([name], cache.hits)
                misses.add_metric([name], cache.misses)
                dropped.add_metric([name], cache.dropped)
                size.add_metric([name], cache.size_bytes)
                capacity.add_metric([name], cache.capacity_bytes)
        yield from (serving, limit, groups, tokens, batches, busy, hits, misses, dropped, size, capacity)

    describe = collect


def _sum_by_label(values: Mapping[str, float]) -> dict[str, float]:
    """Sums the values by label, of the MAX_JOBS largest; names with the same beginning share a label."""
    summed: collections.defaultdict[str, float] = collections.defaultdict(float)
    for job, value in values.items():
        summed[job[:LABEL_CHARACTERS]] += value
    return dict(sorted(summed.items(), key=lambda item: -item[1])[:MAX_JOBS])
