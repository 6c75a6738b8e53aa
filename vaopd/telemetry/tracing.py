"""OpenTelemetry traces: switched on by the standard variables, exported by the optional extra `otel`.

    OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 vaopd up CONFIG

Otherwise the tracer is the API's own, which records nothing. A span is continued elsewhere by its `Context`, which goes
with a gRPC call's metadata (`make_metadata`, `read_parent`) and to other threads by hand (`get_context`). It does not
go through Redis; there, the ids of groups are attributes of the spans on both sides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vaopd.errors import ConfigError

EXPORTER = "OTEL_TRACES_EXPORTER"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_ENTRY_POINTS = {"console": "console", "grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

_propagator = TraceContextTextMapPropagator()
_tracer: trace.Tracer = trace.NoOpTracer()


def set_up(process: str) -> None:
    """Starts tracing when the environment asks for it.

    Raises ConfigError for an exporter or a protocol that is not known, or not installed.
    """
    if not is_wanted():
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
    provider.add_span_processor(BatchSpanProcessor(_make_exporter()))
    use(provider)


def is_wanted() -> bool:
    """Returns whether the environment asks for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    asked = os.environ.get(EXPORTER)
    return asked != "none" if asked else any(os.environ.get(name) for name in ENDPOINTS)


def use(provider: trace.TracerProvider) -> None:
    """Makes the spans with `provider`; `trace.NoOpTracerProvider()` ends tracing.

    Not the global provider: libraries that trace themselves (vLLM) stay silent.
    """
    global _tracer
    _tracer = provider.get_tracer("vaopd")


def _make_exporter() -> Any:
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
    """Traces the block, below `parent` or the current span. Attributes are named vaopd.KEY; None is left out."""
    linked = [trace.Link(trace.get_current_span(link).get_span_context()) for link in links if link is not None]
    with _tracer.start_as_current_span(name, context=parent, links=linked, attributes=_name_attributes(attributes)):
        yield


def record(name: str, *, since_ns: int, **attributes: Any) -> None:
    """Traces what ends now and began at `since_ns` (since 1970), for work that runs beside other such work."""
    _tracer.start_span(name, start_time=since_ns, attributes=_name_attributes(attributes)).end()


def begin(name: str, *, parent: Context | None = None, **attributes: Any) -> Callable[[], None]:
    """Starts a server's span, current for the rest of this task, and returns the function that ends it.

    For generators, which may be closed in another task than they were begun in, where a `with` could not be undone.
    """
    begun = _tracer.start_span(
        name, context=parent, kind=trace.SpanKind.SERVER, attributes=_name_attributes(attributes)
    )
    context.attach(trace.set_span_in_context(begun))
    return begun.end


def get_context() -> Context:
    """Returns the context to give another thread, for its `parent` and `links`."""
    return context.get_current()


def make_metadata() -> tuple[tuple[str, str], ...]:
    """Returns the gRPC metadata by which the other side continues the trace; empty outside of one."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return tuple(carrier.items())


def read_parent(received: Sequence[tuple[str, Any]] | None) -> Context:
    """Returns the context that `make_metadata` sent; also from HTTP headers, by their names in lower case."""
    return _propagator.extract({key: value for key, value in received or () if isinstance(value, str)})


def get_ids() -> dict[str, str]:
    """Returns the current span's ids for log lines; none where this process doesn't trace."""
    found = trace.get_current_span().get_span_context()
    if not found.is_valid or found.is_remote:  # without a tracer of ours, a caller's span is the current one
        return {}
    return {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}


def _name_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"vaopd.{key}": value for key, value in attributes.items() if value is not None}
