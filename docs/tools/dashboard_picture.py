"""Draws the dashboard's panels as a picture, from a running Prometheus' answers to the dashboard's queries.

    python docs/tools/dashboard_picture.py http://127.0.0.1:9099 docs/images/dashboard.png --minutes 5

For documentation made without Grafana: the panels' content is the same, their look is not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.dates
import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "monitoring" / "grafana" / "dashboards" / "vaopd.json"
INTERVAL = "2m"
DAY_S = 86_400  # matplotlib counts days since 1970
FORMATS = {
    "percentunit": lambda value, _: f"{100 * value:.3g} %",
    "bytes": lambda value, _: f"{value / 2**20:.0f} MiB",
    "s": lambda value, _: f"{value:g} s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prometheus", metavar="URL")
    parser.add_argument("picture", metavar="FILE", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back")
    parser.add_argument(
        "--end", type=float, default=time.time(), help="end of the time range, seconds since 1970 (default: now)"
    )
    arguments = parser.parse_args()
    end = arguments.end
    panels = json.loads(DASHBOARD.read_text())["panels"]
    draw(panels, arguments.prometheus, start=end - 60 * arguments.minutes, end=end).savefig(arguments.picture)


def draw(panels: list[dict[str, Any]], url: str, *, start: float, end: float) -> plt.Figure:
    """Draws the panels in the dashboard's grid of 24 columns."""
    mpl.rcParams |= {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8}
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(15, 0.29 * height), dpi=100)
    for panel in panels:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        left, bottom = (x + 0.6) / 24, 1 - (y + h - 1.2) / height
        if panel["type"] == "row":
            figure.text(0.02, 1 - (y + 0.8) / height, panel["title"], weight="bold", size=10)
            continue
        axes = figure.add_axes((left + 0.015, bottom, (w - 1.4) / 24, (h - 2.6) / height))
        axes.set_title(panel["title"], loc="left", weight="bold")
        series = [
            (legend(target["legendFormat"], found["metric"]), found["values"])
            for target in panel["targets"]
            for found in ask(url, target["expr"], start=start, end=end)
        ]
        (stat if panel["type"] == "stat" else graph)(axes, panel, series)
        if panel["type"] != "stat":
            axes.set_xlim(start / DAY_S, end / DAY_S)
    return figure


def ask(url: str, query: str, *, start: float, end: float) -> list[dict[str, Any]]:
    text = query.replace("$job", ".*").replace("$__rate_interval", INTERVAL)
    parameters = urllib.parse.urlencode({"query": text, "start": start, "end": end, "step": (end - start) / 200})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{parameters}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form.split("{{")[0].strip()


def stat(axes: Axes, panel: dict[str, Any], series: list[tuple[str, list[list[Any]]]]) -> None:
    axes.axis("off")
    unit = FORMATS.get(panel["fieldConfig"]["defaults"]["unit"], lambda value, _: f"{value:g}")
    for name, values in series[:1]:
        axes.text(0, 0.25, unit(round(float(values[-1][1]), 3), None), size=18, color="#1f77b4")
        axes.text(0, 0.0, name, size=6, color="grey")


def graph(axes: Axes, panel: dict[str, Any], series: list[tuple[str, list[list[Any]]]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    drawn = []
    for name, values in series:
        points = [(at, float(value)) for at, value in values]
        times = [at / DAY_S for at, _ in points]
        drawn.append((name, times, [value if math.isfinite(value) else math.nan for _, value in points]))
    if defaults["custom"]["stacking"]["mode"] == "normal" and drawn:
        instants = sorted({at for _, times, _ in drawn for at in times})
        rows = [[dict(zip(times, values, strict=True)).get(at, 0.0) for at in instants] for _, times, values in drawn]
        axes.stackplot(instants, rows, labels=[name for name, _, _ in drawn], alpha=0.7)
    else:
        for name, times, values in drawn:
            axes.plot(times, values, linewidth=1, label=name)
    if defaults["unit"] in FORMATS:
        axes.yaxis.set_major_formatter(FORMATS[defaults["unit"]])
    if "min" in defaults:
        axes.set_ylim(bottom=0)
    if "max" in defaults:
        axes.set_ylim(top=1.05 * defaults["max"])
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(matplotlib.dates.AutoDateLocator(maxticks=6))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.grid(alpha=0.25, linewidth=0.5)
    if len(drawn) > 1 or (drawn and drawn[0][0]):
        axes.legend(fontsize=5, frameon=False, loc="upper left", ncols=2)


if __name__ == "__main__":
    main()
