"""The Prometheus metrics of a rollout worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vaopd.sampling.engine import Outcome
from vaopd.types import RolloutGroup

JOB = "vaopd_job"
DURATION_BUCKETS_S = (0.3, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
ERRORS = ("lease_lost", "redis_unavailable", "refused_request")


class WorkerMetrics:
    """Counts groups, rollouts, tokens and errors. Call `watch` once there is a queue."""

    def __init__(self, *, job: str) -> None:
        """job: the value of the label `vaopd_job`."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vaopd_rollout_{name}", text, (JOB, *labels), registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vaopd_rollout_{name}", text, [JOB], registry=self.registry)

        self._groups = counter("groups", "Prompt groups that were sampled").labels(job)
        self._rollouts = counter("rollouts", "Rollouts in them").labels(job)
        self._tokens = counter("tokens", "Response tokens in them").labels(job)
        self._truncated = counter("truncated_rollouts", "Of those, cut at the length limit").labels(job)
        self._errors = counter(
            "errors",
            "Leases lost to another worker, attempts that Redis did not take, requests that went to the dead letters",
            "kind",
        )
        self._job = job
        for kind in ERRORS:  # so that the first one is an increase
            self._errors.labels(job, kind)
        self._busy = counter("engine_busy_seconds", "Time in which the engine sampled").labels(job)
        self._durations = Histogram(
            "vaopd_rollout_group_duration_seconds",
            "Time from a group's first token until its last sibling ended; many groups run beside each other",
            [JOB],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        ).labels(job)
        self._loads = Histogram(
            "vaopd_rollout_policy_load_duration_seconds",
            "Time to load a policy version's weights",
            [JOB],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        ).labels(job)
        self._version = gauge("policy_version", "Version of the loaded weights; -1 before the first").labels(job)
        self._version.set(-1)
        self._leases = gauge("leases", "Requests that this worker holds now").labels(job)

    def watch(self, *, leases: Callable[[], int]) -> None:
        """leases: returns the number of leases held; called at each scrape."""
        self._leases.set_function(leases)

    @contextmanager
    def time_load(self, version: int) -> Iterator[None]:
        """Times a `with` block that loads a policy version, and shows the version once it ends well."""
        with self._loads.time():
            yield
        self._version.set(version)

    @contextmanager
    def time_engine(self) -> Iterator[None]:
        """Counts the time of a `with` block in which the engine samples."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._busy.inc(time.monotonic() - began_s)

    def count_outcome(self, outcome: Outcome) -> None:
        """Counts a group, or a request that the engine refused."""
        if isinstance(outcome, RolloutGroup):
            self._groups.inc()
            self._rollouts.inc(len(outcome.rollouts))
            self._tokens.inc(sum(len(rollout.response_ids) for rollout in outcome.rollouts))
            self._truncated.inc(sum(rollout.finish_reason == "length" for rollout in outcome.rollouts))
            self._durations.observe(outcome.generation_s)
        else:
            self.count_error("refused_request")

    def count_error(self, kind: str) -> None:
        """Counts an error; `kind` is one of ERRORS."""
        self._errors.labels(self._job, kind).inc()
