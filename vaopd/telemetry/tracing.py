"""OpenTelemetry traces, when they are asked for: the optional extra `otel`, switched on by the standard variables.

    OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 vaopd up CONFIG

Otherwise everything here costs a comparison. What a span needs to be continued elsewhere is a `Context`: it goes with a
gRPC call's metadata (`metadata`, `parent_of`) and to other threads by hand (`current`). It does not go through Redis;
there, the ids of groups are attributes of the spans on both sides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from vaopd.errors import ConfigError

EXPORTER = "OTEL_TRACES_EXPORTER"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_ENTRY_POINTS = {"console": "console", "grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

Context = Any
"""An opentelemetry.context.Context."""

_tracer: Any = None


def set_up(process: str) -> None:
    """Begins to trace when the environment asks for it. Raises ConfigError for what can't be had."""
    if not wanted():
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("traces are asked for (OTEL_…), but not installed: pip install 'vaopd[otel]'") from None
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before this name.
    resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"vaopd-{process}"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    use(provider)


def wanted() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    asked = os.environ.get(EXPORTER)
    return asked != "none" if asked else any(os.environ.get(name) for name in ENDPOINTS)


def use(provider: Any) -> None:
    """An opentelemetry.sdk.trace.TracerProvider to make the spans with; None ends tracing."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("vaopd")


def _exporter() -> Any:
    kind = os.environ.get(EXPORTER) or "otlp"
    if kind == "otlp":
        kind = next(filter(None, map(os.environ.get, PROTOCOLS)), "grpc")
    if kind not in _ENTRY_POINTS:
        raise ConfigError(
            f"{EXPORTER} and {PROTOCOLS[1]} ask for {kind!r}; known are the exporters otlp, console and none, and the "
            "protocols grpc and http/protobuf"
        )
    found = entry_points(group="opentelemetry_traces_exporter", name=_ENTRY_POINTS[kind])
    if not found:
        raise ConfigError(f"no OpenTelemetry exporter for {kind!r} is installed: pip install 'vaopd[otel]'")
    return next(iter(found)).load()()


@contextmanager
def span(
    name: str, *, parent: Context | None = None, links: Iterable[Context | None] = (), **attributes: Any
) -> Iterator[None]:
    """A span around the block, below `parent` or what is current. Attributes are named vaopd.KEY; None is left out."""
    if _tracer is None:
        yield
        return
    from opentelemetry import trace

    given = [trace.get_current_span(link).get_span_context() for link in links if link is not None]
    with _tracer.start_as_current_span(
        name, context=parent, links=[trace.Link(context) for context in given], attributes=_named(attributes)
    ):
        yield


def begin(name: str, *, parent: Context | None = None, **attributes: Any) -> Callable[[], None]:
    """A server's span, current for the rest of this task; returns what ends it.

    For generators, which may be closed elsewhere than they were begun, where a `with` could not be undone.
    """
    if _tracer is None:
        return lambda: None
    from opentelemetry import context, trace

    begun = _tracer.start_span(name, context=parent, kind=trace.SpanKind.SERVER, attributes=_named(attributes))
    context.attach(trace.set_span_in_context(begun))
    return lambda: begun.end()


def current() -> Context | None:
    """For `parent` and `links` on another thread."""
    if _tracer is None:
        return None
    from opentelemetry import context

    return context.get_current()


def metadata() -> tuple[tuple[str, str], ...]:
    """What a gRPC call carries so that the other side continues the trace."""
    if _tracer is None:
        return ()
    carrier: dict[str, str] = {}
    _propagator().inject(carrier)
    return tuple(carrier.items())


def parent_of(received: Sequence[tuple[str, Any]] | None) -> Context | None:
    """The other side of `metadata`; also for HTTP headers, by their names in lower case."""
    if _tracer is None:
        return None
    return _propagator().extract({key: value for key, value in received or () if isinstance(value, str)})


def ids() -> dict[str, str]:
    """Of the current span, for log lines."""
    if _tracer is None:
        return {}
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    if not found.is_valid:
        return {}
    return {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"vaopd.{key}": value for key, value in attributes.items() if value is not None}
