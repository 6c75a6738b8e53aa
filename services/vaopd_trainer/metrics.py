"""The trainer's Prometheus metrics: the numbers of its last step, and counters since it started.

Only the coordinator, which has the numbers of all ranks, serves them. `vaopd_trainer.step_numbers` computes the
numbers. The queue's depth is read from Redis at each scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vaopd.errors import VaopdError
from vaopd.evaluation import HeldOutResult
from vaopd.queue.depth import Depth
from vaopd_trainer.step_numbers import DESCRIPTIONS, STEP_TIMES

JOB = "vaopd_job"
GAUGES = {
    "loss": "loss_nats",
    "mean_va": "visual_advantage_nats",
    "va_top10_share": "visual_advantage_top10_ratio",
    "weights_entropy": "rollout_weights_entropy_nats",
    "response_tokens_mean": "response_length_tokens",
    "truncated_fraction": "truncated_ratio",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "policy_drift_mean": "policy_drift_mean_nats",
    "policy_drift_max": "policy_drift_max_nats",
    "policy_drift_share": "policy_drift_ratio",
    "score_overlap": "scoring_overlap_ratio",
    "records_left_out": "records_left_out",
}
"""Key in metrics.jsonl -> name here, after vaopd_trainer_."""
KL_TOKENS = {"kl_mean": "all", "kl_high": "high", "kl_low": "low"}
FATES = ("stale", "duplicate", "other_weights", "dead")
DEPTHS = {
    "queue_requests": ("requests", "Requests in Redis that are not answered"),
    "queue_groups": ("groups", "Groups in Redis that are in no durable checkpoint yet"),
    "queue_dead_letters": ("dead_letters", "Dead letters in Redis; `vaopd queue dead` lists them"),
    "rollout_workers": ("workers", "Rollout workers seen in the last 30 s"),
}
"""Name here -> field of the queue's Depth, meaning."""
LAG_BUCKETS = (0, 1, 2, 4, 8, 16)


class TrainerMetrics:
    """Holds the metrics of one job. The main thread writes them; scrapes read them on threads of their own."""

    def __init__(self, *, job: str, steps: int) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"vaopd_trainer_{name}", text, (JOB, *labels), registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vaopd_trainer_{name}", text, (JOB, *labels), registry=self.registry)

        self._job = job
        self._step = gauge("step", "Optimizer steps that were taken, those before a resume too").labels(job)
        gauge("steps_planned", "Optimizer steps in all").labels(job).set(steps)
        self._progress = gauge(
            "last_progress_timestamp_seconds",
            "When a group last arrived, or a step or an evaluation was last finished, since 1970",
        ).labels(job)
        # A number that isn't known before the first step is missing until then: 0 would be wrong.
        texts = {key: "Last step: " + DESCRIPTIONS[key].replace(" of the step", "") for key in GAUGES}
        self._gauges = {key: gauge(name, texts[key]) for key, name in GAUGES.items()}
        self._kl = gauge("kl_nats", "Last step: mean reverse KL of all response tokens, high group, others", "tokens")
        self._accuracy = gauge("held_out_accuracy_ratio", "Last evaluation: avg@n on the held-out problems")
        self._accuracy_error = gauge("held_out_accuracy_standard_error_ratio", "Its standard error, over problems")
        self._student_va = gauge(
            "held_out_student_visual_advantage_nats",
            "Last evaluation: the student's own VA, mean over the tokens of its answers",
        )
        self._unasked = gauge("held_out_unasked_problems", "Last evaluation: problems that could not be asked")
        self._parts = counter(
            "step_seconds",
            "Time by part of a step: publish (the policy), wait (for groups), score (for scores after the last group "
            "has arrived), forward_backward",
            "part",
        )
        self._rollouts = counter("rollouts", "Rollouts that were trained on").labels(job)
        self._tokens = counter("tokens", "Response tokens in them").labels(job)
        self._skipped = counter(
            "steps_skipped", "Steps whose gradient was not finite, so that they changed nothing"
        ).labels(job)
        self._lag = Histogram(
            "vaopd_trainer_group_lag_versions",
            "How many policy versions old each group was when it was trained on",
            [JOB],
            buckets=LAG_BUCKETS,
            registry=self.registry,
        ).labels(job)
        for part in STEP_TIMES:
            self._parts.labels(job, part.removesuffix("_s"))
        self._at_scrape = _AtScrape(job)
        self.registry.register(self._at_scrape)
        self.note_progress()

    def watch(self, *, depth: Callable[[], Depth], counts: Mapping[str, int]) -> None:
        """Adds the queue's depth and the unused groups by reason (`counts`); both are read at each scrape."""
        self._at_scrape.depth, self._at_scrape.counts = depth, counts

    def note_progress(self) -> None:
        """Sets the time of the last progress to now."""
        self._progress.set(time.time())

    def set_step(self, step: int) -> None:
        """Sets the number of steps taken, at the start of a process."""
        self._step.set(step)

    def note_step(self, steps: int, values: Mapping[str, float], *, rollouts: float, lags: Sequence[int]) -> None:
        """Takes over a finished step's numbers.

        steps: how many have been taken. values: a line of metrics.jsonl. lags: each trained group's age in versions.
        """
        self.note_progress()
        self._step.set(steps)
        for key, metric in self._gauges.items():
            if key in values:
                metric.labels(self._job).set(values[key])
        for key, tokens in KL_TOKENS.items():
            if key in values:
                self._kl.labels(self._job, tokens).set(values[key])
        for part in STEP_TIMES:
            self._parts.labels(self._job, part.removesuffix("_s")).inc(values[part])
        self._rollouts.inc(rollouts)
        self._tokens.inc(rollouts * values["response_tokens_mean"])
        for lag in lags:
            self._lag.observe(lag)
        if values.get("skipped"):
            self._skipped.inc()
            self._at_scrape.skipped += len(lags)
        else:
            self._at_scrape.trained += len(lags)

    def note_evaluation(self, result: HeldOutResult, *, student_va: float | None) -> None:
        """Takes over an evaluation; its accuracy is missing where no problem could be asked."""
        self.note_progress()
        self._unasked.labels(self._job).set(sum(result.not_asked.values()))
        values = ((self._accuracy, result.accuracy), (self._accuracy_error, result.standard_error))
        for metric, value in (*values, (self._student_va, student_va)):
            if value is None:
                metric.clear()
            else:
                metric.labels(self._job).set(value)


class _AtScrape(Collector):
    """Reads the queue's depth and the groups by fate at each scrape."""

    def __init__(self, job: str) -> None:
        self.depth: Callable[[], Depth] | None = None
        self.counts: Mapping[str, int] = {}
        self.trained = 0
        self.skipped = 0
        self._job = job

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics; those of the queue's depth only while Redis answers."""
        if self.depth is None:
            return self._make_families(None)
        try:
            return self._make_families(self.depth())
        except VaopdError:  # redis_up says so; the trainer's log says why
            return self._make_families(None)

    def describe(self) -> Iterator[Metric]:
        """Yields the metrics without reading Redis."""
        return self._make_families(None)

    def _make_families(self, depth: Depth | None) -> Iterator[Metric]:
        groups = CounterMetricFamily(
            "vaopd_trainer_groups",
            "Groups by fate: trained; skipped with their step; stale, duplicate and other_weights were dropped; dead "
            "will never come",
            labels=(JOB, "fate"),
        )
        groups.add_metric([self._job, "trained"], self.trained)
        groups.add_metric([self._job, "skipped"], self.skipped)
        for fate in FATES:
            groups.add_metric([self._job, fate], self.counts.get(fate, 0))
        yield groups
        up = "1 when Redis answered this scrape; the next four are missing when it didn't"
        yield self._make_gauge("redis_up", up, 0 if depth is None else 1)
        for name, (key, text) in DEPTHS.items():
            yield self._make_gauge(name, text, None if depth is None else getattr(depth, key))

    def _make_gauge(self, name: str, text: str, value: int | None) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vaopd_trainer_{name}", text, labels=[JOB])
        if value is not None:
            family.add_metric([self._job], value)
        return family
