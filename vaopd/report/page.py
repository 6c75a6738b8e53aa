"""Makes one self-contained HTML file of runs' folders: configuration, curves, comparison, rollouts coloured by VA.

The page loads nothing, follows the reader's light or dark mode, and fits a phone. Its numbers come from
`vaopd.run.records`; `charts.py` and `rollouts.py` choose what is shown, `charts.js` and `samples.js` draw it,
`page.html.jinja` is the page.
The scoring API serves the pages of unfinished runs too; those reload themselves.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vaopd.errors import InvalidInput, VaopdError
from vaopd.files.durable import write_atomic
from vaopd.report import charts
from vaopd.report.advice import describe_regime
from vaopd.report.curves import SMOOTHING_STEPS
from vaopd.report.groups import group_runs, list_history, name_variant
from vaopd.report.rollouts import FULL_COLOUR_NATS, TOKENS_SHOWN, select_samples
from vaopd.run.records import Run, is_number, read_run
from vaopd.telemetry.progress_line import format_duration

# Different in every run, and never the reason for a different curve.
OWN_TO_A_RUN = ("run.name", "run.folder", "teacher.address", "queue.url", "api.address")
SCRIPTS = ("charts.js", "samples.js", "page.js")
REVISION_CHARACTERS = 12
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vaopd.report", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


def write_report(folders: Sequence[Path], *, output: Path | None = None, band: str = "range") -> Path:
    """Writes the page of the runs and returns its path: `output`, or report.html in the first folder.

    Several runs are compared first, then shown one by one. `band`: see `report_html`. Raises NotFound or InvalidInput.
    """
    page = report_html([read_run(folder) for folder in folders], band=band)
    output = output or folders[0] / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    # A browser may reload the page at any moment, and must not see half of it.
    write_atomic(output, page)
    return output


def plot_accuracy(folders: Sequence[Path], output: Path, *, band: str = "range") -> Path:
    """Writes the accuracy curves alone, grouped by objective, as an image in the format of `output`'s suffix."""
    from vaopd.report import plots

    plots.save_comparison([read_run(folder) for folder in folders], output, band=band)
    return output


def report_html(runs: Sequence[Run], *, band: str = "range", again_s: int | None = None) -> str:
    """Returns the page of these runs.

    band: around the mean over seeds, "range" (lowest to highest) or "standard-error".
    again_s: seconds after which the page asks its own address again, until the run is finished; None: never.
    """
    return _TEMPLATES.get_template("page.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        policy=Markup(content_security_policy(live=again_s is not None)),
        again_s=again_s,
        state=runs[0].state,
        style=Markup(_read_asset("page.css")),
        script=Markup(_read_script()),
        smoothing_steps=SMOOTHING_STEPS,
        full_colour_nats=FULL_COLOUR_NATS,
        comparison=_compare(runs, band=band) if len(runs) > 1 else None,
        runs=[_describe_or_name(run, tokens=TOKENS_SHOWN // len(runs)) for run in runs],
    )


def _describe_or_name(run: Run, *, tokens: int) -> dict[str, Any]:
    try:
        return _describe(run, tokens=tokens)
    except VaopdError:
        raise
    except Exception as error:
        # Records that have their types, and still can't be drawn: the run is named, and no other one is at fault.
        raise InvalidInput(
            f"the records of run {run.folder} can't be shown ({error!r}); repair or remove them"
        ) from error


def content_security_policy(*, live: bool) -> str:
    """Returns the page's policy: it loads nothing, and runs its own script only. A live one may reload itself."""
    digest = base64.b64encode(hashlib.sha256(_read_script().encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"{policy}; connect-src 'self'" if live else policy


@functools.cache
def _read_asset(name: str) -> str:
    return resources.files("vaopd.report").joinpath(name).read_text()


def _read_script() -> str:
    return "".join(_read_asset(name) for name in SCRIPTS)


def _describe(run: Run, *, tokens: int) -> dict[str, Any]:
    """Returns one run's section as the template takes it; `tokens`: how many its samples may have."""
    return {
        "name": run.name,
        "state": run.state,
        "state_text": _describe_state(run),
        "facts": list(_make_facts(run)),
        "tiles": list(_make_tiles(run)),
        "history": [_describe_change(*change) for change in run.list_changes()] + list(_describe_teachers(run)),
        "regime": describe_regime(run),
        "started": bool(run.train or run.evaluations),
        "smoothed": bool(run.train),
        "charts": list(charts.make_charts(run)),
        "samples": select_samples(run, tokens=tokens),
        "settings": [(f"{section}.{key}", _format_value(value)) for section, key, value in _list_settings(run.config)],
    }


def _make_tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yields name, value and note of each number at the top of a run's section."""
    for none in run.without_accuracy[-1:]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in none.not_asked.items())
        yield (f"held-out accuracy, step {none.step}", "none", f"no question could be asked: {reasons}")
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        yield (f"held-out accuracy, step {first.step}", first.label, "")
        if last is not first:
            gain = 100 * (last.accuracy - first.accuracy)
            yield (f"held-out accuracy, step {last.step}", last.label, f"{gain:+.1f} points")
        problems = f"{last.prompts} problems, {last.samples} answer{'s' if last.samples > 1 else ''} each"
        yield ("judged on", problems, "± one standard error")
        if last.not_asked:
            reasons = ", ".join(f"{count} {reason}" for reason, count in last.not_asked.items())
            yield ("not asked", f"{sum(last.not_asked.values())} problems", reasons)
        judges = " and ".join(dict.fromkeys(evaluation.judge or "1" for evaluation in run.evaluations))
        yield ("judge", judges, "its version")
    if left_out := run.list_series("records_left_out")[1]:
        yield ("bad records left out", f"{left_out[-1]:.0f}", "of the training split; `vaopd data check` lists them")
    steps = f"{run.steps_done} of {run.steps_planned}" if run.steps_planned is not None else str(run.steps_done)
    yield ("optimizer steps", steps, run.state)
    if skipped := sum(1 for line in run.train if line.get("skipped")):
        yield ("skipped steps", str(skipped), "their gradient was not finite, and they changed nothing")
    yield ("objective", name_variant(run.variant), f"seed {run.seed}")
    for key, name, form in (("rollouts_per_s", "rollouts per second", "{:.1f}"), ("mean_va", "mean VA", "{:.3f} nats")):
        if (mean := run.compute_mean(key)) is not None:
            yield (name, form.format(mean), "mean over the run")
    measured = [e.student_va for e in run.evaluations if e.student_va is not None]
    if measured:
        before = f"first {measured[0].mean:.3f}, " if len(measured) > 1 else ""
        note = f"{before}± {measured[-1].error:.3f}; on its answers to {measured[-1].problems} held-out problems"
        yield ("the student's own VA", f"{measured[-1].mean:.3f} nats", note)
    if (drift := run.compute_mean("policy_drift_share")) is not None:
        yield ("policy drift", f"{drift:.1%}", "of the tokens differ by over 0.1 nats between worker and trainer")
    means = [run.compute_mean(key) for key in charts.TIMES]
    if all(mean is not None for mean in means):
        yield ("one step", f"{sum(mean or 0 for mean in means):.1f} s", "mean, without evaluations")


def _compare(runs: Sequence[Run], *, band: str) -> dict[str, Any]:
    """Returns the comparison of several runs as the template takes it."""
    # Settings that differ between the runs, names and addresses aside.
    flat = [{f"{section}.{key}": value for section, key, value in _list_settings(run.config)} for run in runs]
    flat = [values | list_history(run) for values, run in zip(flat, runs, strict=True)]
    if any(not run.history for run in runs):  # one of an earlier vaopd doesn't name its teacher
        flat = [{key: value for key, value in values.items() if key != "teacher"} for values in flat]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key not in OWN_TO_A_RUN]
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    return {
        "charts": list(charts.make_comparison_charts(runs, band=band)),
        "band": band,
        "repeats": [f"{g.label}: {g.describe_repeats()}" for g in group_runs(runs) if g.describe_repeats()],
        "rows": [_make_row(run) for run in runs],
        "differences": [(key, *(_format_value(values.get(key)) for values in flat)) for key in differing],
    }


def _describe_state(run: Run) -> str:
    """Returns the state in a sentence, with the step and the reason of a run that ended early."""
    status = run.status
    if status is None or run.finished:
        return f"The run is {run.state}."
    if status.state == "failed":
        return f"The run failed at step {status.step}: {status.reason}"
    return f"The run was stopped at step {status.step}." if status.state == "stopped" else f"The run is {status.state}."


def _make_facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yields name and value of what the run is made of: models, data, dates."""
    yield ("student", str(run.config.get("student", {}).get("model", "–")))
    teacher = run.history[-1]["teacher"] if run.history else {}
    model = str(teacher.get("model") or run.config.get("teacher", {}).get("model", "–"))
    revision = str(teacher.get("revision", ""))[:REVISION_CHARACTERS]
    yield ("teacher", f"{model}, revision {revision}" if revision else model)
    data = run.config.get("data", {})
    yield ("data", ", ".join(str(data[key]) for key in ("source", "name", "split") if data.get(key)) or "–")
    starts = [line["time_s"] for line in run.history if is_number(line.get("time_s"))]
    times = [*starts, *run.list_series("time_s")[1]]
    if not times:
        return
    again = f", {len(starts)} times; last {_format_time(starts[-1])}" if len(starts) > 1 else ""
    yield ("started", _format_time(times[0]) + again)
    ended = run.status is not None and not run.may_continue
    last_s = run.status.since_s if run.status is not None and ended else times[-1]
    yield ("ended" if ended else "last step", f"{_format_time(last_s)}, after {format_duration(last_s - times[0])}")


def _format_time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _describe_change(step: int, key: str, old: Any, new: Any) -> str:
    return f"From step {step} on, {key} is {_format_value(new)}; before, it was {_format_value(old)}."


def _describe_teachers(run: Run) -> Iterator[str]:
    teachers = run.list_teachers()
    for (_, old), (step, new) in itertools.pairwise(teachers):
        yield f"From step {step} on, another teacher was accepted: revision {new[:16]}; before, it was {old[:16]}."


def _make_row(run: Run) -> tuple[str, ...]:
    """Returns a run's line of the table that compares runs."""
    first, last = (run.evaluations[0].label, run.evaluations[-1].label) if run.evaluations else ("–", "–")
    rate = run.compute_mean("rollouts_per_s")
    steps = f"{run.steps_done}" + ("" if run.finished else f" of {run.steps_planned}, {run.state}")
    name = name_variant(run.variant)
    return (run.name, name, str(run.seed), steps, first, last, "–" if rate is None else f"{rate:.1f}")


def _list_settings(config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for section, values in config.items():
        for key, value in values.items():
            # A report may be mailed to others, and a Redis address may hold a password.
            yield section, key, re.sub(r"(?<=://)[^/]*@", "…@", value) if isinstance(value, str) else value


def _format_value(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else repr(value).replace("'", '"')
