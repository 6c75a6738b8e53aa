"""What is deployed for monitoring, against the code: names of metrics, labels, rules; and what the metrics count."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from tests.support.documents import script
from tests.support.prometheus import binary
from vaopd import process
from vaopd.config import load_config
from vaopd.errors import ConfigError, Unavailable
from vaopd.launch.supervisor import Supervisor
from vaopd.launch.up import UpOptions, _Launch
from vaopd.queue.depth import Depth
from vaopd.telemetry import metrics_port
from vaopd.types import Payload
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_api.app import create_app
from vaopd_api.teachers import Teachers
from vaopd_rollout.metrics import WorkerMetrics
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup, finish
from vaopd_teacher.metrics import MAX_JOBS, TeacherMetrics
from vaopd_trainer.metrics import GAUGES, KL_TOKENS, TrainerMetrics
from vaopd_trainer.step_numbers import STEP_TIMES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "vaopd.json"
SUFFIXES = ("_bucket", "_sum", "_count")


def families() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name as Prometheus stores it, a histogram's without suffix -> type and labels, of every process."""
    found = {}
    for registry in script("docs/tools/reference.py").registries().values():
        for collector in list(registry._collector_to_names):
            for metric in collector.describe():
                labels = getattr(metric, "_labelnames", None) or getattr(collector, "_labelnames", ())
                found[metric.name + ("_total" if metric.type == "counter" else "")] = (metric.type, tuple(labels))
    return found


FAMILIES = families()


def expressions() -> dict[str, str]:
    """Where -> query: of every panel and every rule."""
    dashboard = json.loads(DASHBOARD.read_text())
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found = {f"{title} {index}": text for index, (title, text) in enumerate(panels)}
    return found | {rule["alert"]: rule["expr"] for rule in rules}


@pytest.mark.parametrize("where", expressions())
def test_every_metric_and_label_that_is_asked_for_is_in_the_code(where: str) -> None:
    text = expressions()[where]
    for name in re.findall(r"\bvaopd_[a-z_0-9]+", re.sub(r"\bvaopd_job\b", "", text)):
        base = next((name.removesuffix(s) for s in SUFFIXES if name.removesuffix(s) in FAMILIES), name)
        assert base in FAMILIES, f"{where} asks for {name}"
        kind, labels = FAMILIES[base]
        assert name == base or kind == "histogram"
        for used in re.findall(re.escape(name) + r"\{([^}]*)\}", text):
            given = set(re.findall(r"(\w+)\s*[=!]", used))
            assert given <= {*labels, "instance", "le"}, f"{where} narrows {name} by {given}"


@pytest.mark.parametrize("name", FAMILIES)
def test_names_say_the_process_and_the_unit_and_labels_are_few(name: str) -> None:
    kind, labels = FAMILIES[name]
    assert re.match(r"vaopd_(teacher|rollout|trainer|api)_", name)
    assert kind in ("counter", "gauge", "histogram")
    # Nothing that grows with the run: no group, request or image is a label.
    assert set(labels) <= {
        "vaopd_job",
        "reason",
        "cache",
        "kind",
        "fate",
        "part",
        "tokens",
        "method",
        "route",
        "status",
    }
    if kind == "histogram":
        assert name.endswith(("_seconds", "_nats", "_ratio", "_versions"))


def test_the_reference_counts_every_family() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert all(f"`{name}`" in page for name in FAMILIES)


def test_every_panel_says_what_it_shows_and_none_covers_another() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert panel["type"] == "row" or panel["description"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in mine) < 24
        assert not mine & cells
        cells |= mine


def test_the_dashboard_s_source_is_the_provisioned_one() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == json.loads(DASHBOARD.read_text())["templating"]["list"][0]["query"] == "prometheus"


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("check", "config", "prometheus.host.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_is_content(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([binary("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_and_a_place_in_the_documentation() -> None:
    tests = (FOLDER / "alerts.test.yml").read_text()
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for rule in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]:
        assert f"alertname: {rule['alert']}\n" in tests
        assert f"`{rule['alert']}`" in page


# -- what is counted ---------------------------------------------------------------------------------------------------


def read(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_a_teacher_that_loads_is_not_serving_and_says_nothing_else() -> None:
    registry = TeacherMetrics().registry
    assert read(registry, "vaopd_teacher_serving") == 0
    assert read(registry, "vaopd_teacher_queue_limit_groups") is None


def test_only_the_jobs_that_asked_last_have_series() -> None:
    """Names come from outside: a client that makes up a new one for each call must not fill the teacher's memory."""
    metrics = TeacherMetrics()
    for index in range(3 * MAX_JOBS):
        metrics.count_failed(f"job-{index}")
        metrics.count_refused(f"job-{index}", "queue_full")
    metrics.count_refused(None, "unauthenticated")
    jobs = {sample.labels.get("vaopd_job") for family in metrics.registry.collect() for sample in family.samples}
    assert jobs - {None} == {f"job-{index}" for index in range(2 * MAX_JOBS, 3 * MAX_JOBS)} | {"-"}


def test_a_job_s_label_is_short() -> None:
    metrics = TeacherMetrics()
    metrics.count_refused("x" * 10_000, "queue_full")
    assert read(metrics.registry, "vaopd_teacher_refused_calls_total", vaopd_job="x" * 64, reason="queue_full") == 1


def test_what_a_worker_counts_begins_at_nothing() -> None:
    registry = WorkerMetrics(job="geometry").registry
    assert read(registry, "vaopd_rollout_policy_version", vaopd_job="geometry") == -1
    for kind in ("lease_lost", "redis_unavailable", "refused_request"):
        assert read(registry, "vaopd_rollout_errors_total", vaopd_job="geometry", kind=kind) == 0


STEP = {**dict.fromkeys([*GAUGES, *KL_TOKENS], 0.5), **dict.fromkeys(STEP_TIMES, 2.0), "response_tokens_mean": 30.0}


def test_a_step_s_numbers() -> None:
    """Two steps of 4 rollouts of 30 tokens, 8 s each; one of the three groups is two versions old."""
    metrics = TrainerMetrics(job="geometry", steps=10)
    job = {"vaopd_job": "geometry"}
    assert read(metrics.registry, "vaopd_trainer_loss_nats", **job) is None  # not 0: it isn't known yet
    metrics.note_step(1, STEP, rollouts=4, lags=[0, 0, 2])
    metrics.note_step(2, {key: value for key, value in STEP.items() if key != "kl_low"}, rollouts=4, lags=[0, 0, 2])
    expected = {"step": 2, "steps_planned": 10, "loss_nats": 0.5, "rollouts_total": 8, "tokens_total": 240}
    for name, value in expected.items():
        assert read(metrics.registry, f"vaopd_trainer_{name}", **job) == value
    for part in ("publish", "wait", "score", "forward_backward"):
        assert read(metrics.registry, "vaopd_trainer_step_seconds_total", **job, part=part) == 4
    assert read(metrics.registry, "vaopd_trainer_groups_total", **job, fate="trained") == 6
    assert read(metrics.registry, "vaopd_trainer_group_lag_versions_bucket", **job, le="0.0") == 4
    assert read(metrics.registry, "vaopd_trainer_group_lag_versions_sum", **job) == 4


def test_groups_by_fate_are_the_collector_s_and_the_queue_is_read_when_asked() -> None:
    metrics = TrainerMetrics(job="geometry", steps=10)
    counts = {"stale": 3}
    metrics.watch(depth=lambda: Depth(requests=5, groups=4, dead_letters=1, workers=2), counts=counts)
    job = {"vaopd_job": "geometry"}
    assert read(metrics.registry, "vaopd_trainer_groups_total", **job, fate="stale") == 3
    counts["stale"] = 4
    assert read(metrics.registry, "vaopd_trainer_groups_total", **job, fate="stale") == 4
    assert read(metrics.registry, "vaopd_trainer_groups_total", **job, fate="dead") == 0
    assert read(metrics.registry, "vaopd_trainer_queue_requests", **job) == 5
    assert read(metrics.registry, "vaopd_trainer_rollout_workers", **job) == 2
    assert read(metrics.registry, "vaopd_trainer_redis_up", **job) == 1


def test_a_redis_that_is_away_is_told_and_its_depth_is_no_zero() -> None:
    def away() -> Depth:
        raise Unavailable("Redis did not answer")

    metrics = TrainerMetrics(job="geometry", steps=10)
    metrics.watch(depth=away, counts={})
    assert read(metrics.registry, "vaopd_trainer_redis_up", vaopd_job="geometry") == 0
    assert read(metrics.registry, "vaopd_trainer_queue_requests", vaopd_job="geometry") is None


# -- the port ----------------------------------------------------------------------------------------------------------


def test_metrics_are_served_where_asked_and_not_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    Counter("answers", "Counted here", registry=registry).inc(42)
    with caplog.at_level("INFO"), metrics_port.serve_metrics(registry, "127.0.0.1:0"):
        url = re.search(r"http://\S+/metrics", caplog.text)
        assert url is not None
        with urllib.request.urlopen(url[0]) as answer:
            served = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        assert served["answers"].samples[0].value == 42
        assert "process_resident_memory_bytes" in served
        with (
            pytest.raises(ConfigError, match=r"metrics address 127.0.0.1:\d+: Address already in use; choose another"),
            metrics_port.serve_metrics(CollectorRegistry(), url[0].removeprefix("http://").removesuffix("/metrics")),
        ):
            pass


@pytest.mark.parametrize("address", ["9091", "localhost:", ":9091", "localhost:metrics", "localhost:-1"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"is not of the form HOST:PORT, such as 127.0.0.1:9091"),
        metrics_port.serve_metrics(CollectorRegistry(), address),
    ):
        pass


def test_the_environment_says_where_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAOPD_METRICS_ADDRESS", "0.0.0.0:9091")
    parser = argparse.ArgumentParser()
    process.add_flags(parser, "trainer")
    assert metrics_port.choose_metrics_address(parser.parse_args([])) == "0.0.0.0:9091"
    assert metrics_port.choose_metrics_address(parser.parse_args(["--metrics-address", "127.0.0.1:0"])) == "127.0.0.1:0"


def test_mean_advantage_is_of_each_rollout() -> None:
    """Rollouts of 2 and 3 tokens with advantages 0.02, 0.04 and 2, 0 (negative), 4: means 0.03 and 2 nats."""
    prompt = PreparedPrompt(token_ids=np.arange(7), images=())
    responses = (np.arange(2), np.arange(3))
    group = PreparedGroup(group_id="g", original=prompt, degraded=prompt, responses=responses, payload="none", top_k=0)
    columns = {
        "teacher_logprobs": np.array([-1.0, -1.0, -1.0, -3.0, -1.0], np.float32),
        "degraded_logprobs": np.array([-1.02, -1.04, -3.0, -1.0, -5.0], np.float32),
    }
    scored = finish(group, columns, Payload(kind="none", tensors={}))
    assert isinstance(scored, EngineResult)
    metrics = TeacherMetrics()
    metrics.count_scored("geometry", scored, latency_s=0.2)
    name, job = "vaopd_teacher_rollout_visual_advantage_nats", {"vaopd_job": "geometry"}
    assert read(metrics.registry, f"{name}_count", **job) == 2
    assert read(metrics.registry, f"{name}_sum", **job) == pytest.approx(2.03, abs=1e-6)


def test_a_launch_gives_each_process_a_port_that_it_keeps_and_tells_prometheus(tmp_path: Path) -> None:
    said: list[str] = []
    config = load_config(ROOT / "configs" / "tiny.toml", ["run.name=first", f"run.folder={tmp_path}"])
    options = UpOptions(config_path=ROOT / "configs" / "tiny.toml", metrics_port=9091)
    with Supervisor(logs=tmp_path / "logs", say=said.append) as supervisor:
        launch = _Launch(config, options, supervisor, said.append)
        for name in ("rollout-0", "teacher", "rollout-0"):  # the last one is a restart
            child = launch._make_service(name.partition("-")[0], name, devices=None)
            assert child.argv[-2:] == ("--metrics-address", f"127.0.0.1:{9092 if name == 'teacher' else 9091}")
        assert "--metrics-address" not in launch._make_service("api", "api", devices="").argv  # it has a port already
    assert said == [
        "metrics of rollout-0: http://127.0.0.1:9091/metrics",
        "metrics of teacher: http://127.0.0.1:9092/metrics",
    ]
    assert json.loads((tmp_path / "first.targets.json").read_text()) == [
        {"targets": ["127.0.0.1:9091"], "labels": {"role": "rollout", "process": "rollout-0"}},
        {"targets": ["127.0.0.1:9092"], "labels": {"role": "teacher", "process": "teacher"}},
    ]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_api_whose_metrics_have_an_address_of_their_own_doesn_t_show_them_to_its_clients(elsewhere: bool) -> None:
    app = create_app(teachers=Teachers(["127.0.0.1:1"], options={}), metrics_route=not elsewhere)
    assert ("/metrics" in app.openapi()["paths"]) is not elsewhere
