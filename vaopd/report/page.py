"""Runs' folders in, one self-contained HTML file out: configuration, curves, comparison, rollouts coloured by VA.

The page loads nothing from anywhere, follows light and dark, and fits a phone. What it shows comes from
`vaopd.run.records`; the curves are drawn by `plots.py`, the rollouts by `rollouts.py`. The scoring
API serves the page of a run that goes on: then it asks for itself again, and shows what is new.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vaopd.run.records import Evaluation, Run, read_run

__all__ = ["Evaluation", "Run", "plot_accuracy", "read_run", "write_report"]


def write_report(folders: Sequence[Path], *, output: Path | None = None, band: str = "range") -> Path:
    """One run: all its curves, some rollouts, its configuration. Several: compared first, then each one."""
    page = report_html([read_run(folder) for folder in folders], band=band)
    output = output or folders[0] / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    # A browser that reloads the report of a run that goes on never meets half a page.
    aside = output.with_name(output.name + ".part")
    aside.write_text(page)
    os.replace(aside, output)
    return output


def plot_accuracy(folders: Sequence[Path], output: Path, *, band: str = "range") -> Path:
    """Only the accuracy curves, grouped by objective, as an image."""

    from vaopd.report import plots

    plots.save_comparison([read_run(folder) for folder in folders], output, band=band)
    return output


def report_html(runs: Sequence[Run], *, band: str = "range", again_s: int | None = None) -> str:
    """The page of these runs; with `again_s` it asks its own address again after so many seconds, for ever."""
    body = list(_comparison_section(runs, band=band)) if len(runs) > 1 else []
    for run in runs:
        section = "\n".join(_run_section(run))
        if len(runs) == 1:
            body.append(section)
        else:
            body.append(f"<details><summary><h2>{html.escape(run.name)}</h2></summary>{section}</details>")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return PAGE.format(
        title=html.escape(title),
        policy=content_security_policy(live=again_s is not None),
        again="" if again_s is None else f' data-again="{again_s}"',
        style=_asset("page.css"),
        script=_asset("page.js"),
        body="\n".join(body),
    )


def content_security_policy(*, live: bool) -> str:
    """Nothing is loaded, and only the page's own script runs; one that is live may ask where it came from."""
    digest = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"{policy}; connect-src 'self'" if live else policy


@functools.cache
def _asset(name: str) -> str:
    return resources.files("vaopd.report").joinpath(name).read_text()


def _run_section(run: Run) -> Iterator[str]:

    from vaopd.report import plots
    from vaopd.report.rollouts import rollouts_section

    yield f'<dl class="tiles">{"".join(_tiles(run))}</dl>'
    if not run.train and not run.evaluations:
        yield "<p>No step has been taken yet.</p>"
    yield '<div class="figures">'
    for svg in plots.run_svgs(run):
        yield f"<figure>{svg}</figure>"
    yield "</div>"
    if run.train:
        yield f'<p class="note">Strong lines are running means over {plots.SMOOTHING_STEPS} steps.</p>'
    yield from rollouts_section(run)
    yield f"<details><summary>Configuration</summary>{_config_table(run.config)}</details>"


def _tiles(run: Run) -> Iterator[str]:
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        yield _tile(f"held-out accuracy, step {first.step}", first.label)
        if last is not first:
            gain = 100 * (last.accuracy - first.accuracy)
            yield _tile(f"held-out accuracy, step {last.step}", last.label, f"{gain:+.1f} points")
        problems = f"{last.prompts} problems, {last.samples} answer{'s' if last.samples > 1 else ''} each"
        yield _tile("judged on", problems, "± one standard error")
    state = "finished" if run.finished else "not finished"
    steps = f"{run.steps_done} of {run.steps_planned}" if run.steps_planned is not None else str(run.steps_done)
    yield _tile("optimizer steps", steps, state)
    from vaopd.report.plots import TIMES, VARIANT_NAMES

    yield _tile("objective", VARIANT_NAMES.get(run.variant, run.variant), f"seed {run.seed}")
    for key, name, form in (("rollouts_per_s", "rollouts per second", "{:.1f}"), ("mean_va", "mean VA", "{:.3f} nats")):
        if (mean := run.mean(key)) is not None:
            yield _tile(name, form.format(mean), "mean over the run")
    means = [run.mean(key) for key in TIMES]
    if all(mean is not None for mean in means):
        yield _tile("one step", f"{sum(mean or 0 for mean in means):.1f} s", "mean, without evaluations")


def _tile(name: str, value: str, note: str = "") -> str:
    return f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(note)}</small></dd></div>"


def _comparison_section(runs: Sequence[Run], *, band: str) -> Iterator[str]:
    from vaopd.report import plots

    yield '<div class="figures">'
    for svg in plots.comparison_svgs(runs, band=band):
        yield f"<figure>{svg}</figure>"
    words = "from the lowest to the highest seed" if band == "range" else "± one standard error over seeds"
    yield (
        f'</div><p class="note">One colour per objective; lines are means over its seeds (of running means over '
        f"{plots.SMOOTHING_STEPS} steps, accuracy aside), bands go {words}. Unfinished runs of an objective "
        "that has finished ones are left out of the curves.</p>"
    )
    yield f'<div class="wide">{_comparison_table(runs)}</div>'
    yield f'<h3>Where their configurations differ</h3><div class="wide">{_difference_table(runs)}</div>'


def _comparison_table(runs: Sequence[Run]) -> str:
    from vaopd.report.plots import VARIANT_NAMES

    rows = []
    for run in runs:
        first, last = (run.evaluations[0].label, run.evaluations[-1].label) if run.evaluations else ("–", "–")
        rate = run.mean("rollouts_per_s")
        steps = f"{run.steps_done}" + ("" if run.finished else f" of {run.steps_planned}, not finished")
        name = VARIANT_NAMES.get(run.variant, run.variant)
        rows.append((run.name, name, str(run.seed), steps, first, last, "–" if rate is None else f"{rate:.1f}"))
    return _table(("run", "objective", "seed", "steps", "accuracy before", "after", "rollouts/s"), rows)


def _difference_table(runs: Sequence[Run]) -> str:
    """The keys whose values aren't the same everywhere, names and addresses aside."""
    flat = [{f"{section}.{key}": value for section, key, value in _settings(run.config)} for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key not in OWN_TO_A_RUN]
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    rows = [(key, *(_value(values.get(key)) for values in flat)) for key in differing]
    return _table(("", *(run.name for run in runs)), rows) if rows else "<p>They don't.</p>"


def _config_table(config: dict[str, Any]) -> str:
    rows = [(f"{section}.{key}", _value(value)) for section, key, value in _settings(config)]
    return f'<div class="wide">{_table(("field", "value"), rows)}</div>'


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for section, values in config.items():
        for key, value in values.items():
            # A report is mailed around, and a Redis address may hold its password.
            yield section, key, re.sub(r"(?<=://)[^/]*@", "…@", value) if isinstance(value, str) else value


def _value(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else repr(value).replace("'", '"')


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


# Always different, and never the reason for a different curve.
OWN_TO_A_RUN = ("run.name", "teacher.address", "queue.url", "api.address")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title} · vaopd</title><style>
{style}</style></head>
<body{again}><h1>{title}</h1>
<p class="note" id="live" hidden></p>
<main>
{body}
</main>
<output id="details" hidden></output>
<script>{script}</script></body></html>
"""
