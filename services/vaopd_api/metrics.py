"""The API's metrics for Prometheus. One registry per application, so that tests share none."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROUTE_LABELS = ("method", "route")
DURATION_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 120)
VA_BUCKETS_NATS = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """Counts requests, scored tokens and visual advantage."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vaopd_api_requests",
            "Answered requests, by route and HTTP status",
            (*ROUTE_LABELS, "status"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "vaopd_api_request_duration_seconds",
            "Time from a request's headers to the end of its answer",
            ROUTE_LABELS,
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("vaopd_api_requests_in_flight", "Requests that are answered now", registry=self.registry)
        self.tokens = Counter("vaopd_api_scored_tokens", "Response tokens that were scored", registry=self.registry)
        self.visual_advantage = Histogram(
            "vaopd_api_rollout_visual_advantage_nats",
            "Mean visual advantage of each scored response",
            buckets=VA_BUCKETS_NATS,
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
