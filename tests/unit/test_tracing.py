"""Traces are off unless the standard variables ask for them; a span goes on beyond threads and calls."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracerProvider

from vaopd.errors import ConfigError
from vaopd.telemetry import tracing

VARIABLES = ("OTEL_SDK_DISABLED", tracing.EXPORTER, *tracing.PROTOCOLS, *tracing.ENDPOINTS)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(NoOpTracerProvider())


def test_off_nothing_is_made_and_nothing_travels() -> None:
    with tracing.span("step", step=1):
        assert tracing.make_metadata() == ()
        assert tracing.get_ids() == {}


def test_off_a_caller_s_trace_is_handed_on_and_is_not_ours() -> None:
    """So that one process without traces doesn't cut the trace of those around it; its log lines have no ids."""
    received = [("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01")]

    def answer() -> None:
        end = tracing.begin("call", parent=tracing.read_parent(received))
        assert list(tracing.make_metadata()) == received
        assert tracing.get_ids() == {}
        end()

    contextvars.copy_context().run(answer)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_the_standard_variables_switch_it_on(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing.is_wanted() is wanted


@pytest.mark.parametrize(("name", "value"), [("OTEL_TRACES_EXPORTER", "zipkin"), (tracing.PROTOCOLS[1], "http/json")])
def test_an_exporter_that_there_is_none_of_is_told(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"ask for '{value}'; known are the exporters otlp, console and none"):
        tracing.set_up("teacher")


def test_a_span_goes_on_in_another_thread_and_on_the_other_side_of_a_call(spans: InMemorySpanExporter) -> None:
    with tracing.span("step", step=3):
        here = tracing.get_context()
        received = tracing.make_metadata()
        step = tracing.get_ids()

    def elsewhere() -> None:
        with tracing.span("batch", parent=here, groups=["a", "b"], job=None):
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()

    def other_process() -> None:
        end = tracing.begin("call", parent=tracing.read_parent(received))
        assert tracing.get_ids()["trace_id"] == step["trace_id"]
        end()

    thread = threading.Thread(target=other_process)
    thread.start()
    thread.join()

    found = {span.name: span for span in spans.get_finished_spans()}
    assert found["step"].attributes == {"vaopd.step": 3}
    assert found["batch"].attributes == {"vaopd.groups": ("a", "b")}
    for name in ("batch", "call"):
        parent = found[name].parent
        assert parent is not None
        assert f"{parent.span_id:016x}" == step["span_id"]
        assert f"{parent.trace_id:032x}" == step["trace_id"]


def test_calls_that_share_a_batch_are_linked(spans: InMemorySpanExporter) -> None:
    contexts = []
    for name in ("first", "second"):
        with tracing.span(name):
            contexts.append(tracing.get_context())
    with tracing.span("batch", parent=contexts[0], links=contexts[1:]):
        pass
    found = {span.name: span for span in spans.get_finished_spans()}
    assert [link.context.span_id for link in found["batch"].links] == [found["second"].context.span_id]


def test_a_header_that_is_no_trace_begins_a_new_one(spans: InMemorySpanExporter) -> None:
    received = [("traceparent", "nonsense"), ("blob-bin", b"\x00")]
    # A task of its own, as a call has one: its context ends with it.
    contextvars.copy_context().run(lambda: tracing.begin("call", parent=tracing.read_parent(received))())
    (span,) = spans.get_finished_spans()
    assert span.parent is None
