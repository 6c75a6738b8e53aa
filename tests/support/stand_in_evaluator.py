"""Stands in for the official evaluator, with the tasks and files of vaopd/benchmarks_eval/vlmeval_runner.py.

Scores by the text of the answer. A judged benchmark asks the judge once per answer: "1" is right.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

csv.field_size_limit(sys.maxsize)
DATA = Path(os.environ["LMUData"])  # noqa: SIM112


def ask(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def export(task: dict[str, Any], rows: list[dict[str, str]]) -> str:
    lines = []
    for row in rows:
        image = DATA / f"{task['dataset']}-{row['index']}.png"
        image.write_bytes(base64.b64decode(row["image"]))
        parts = [{"type": "image", "value": str(image)}, {"type": "text", "value": row["question"]}]
        lines.append(json.dumps({"id": row["index"], "parts": parts}) + "\n")
    return "".join(lines)


def score(task: dict[str, Any], rows: list[dict[str, str]]) -> str:
    lines = [json.loads(line) for line in Path(task["answers"]).read_text().splitlines()]
    answers = {line["question"]: line["answer"] for line in lines if line["sample"] == task["sample"]}
    assert set(answers) == {row["index"] for row in rows}
    right = 0
    for row in rows:
        answer, reference = answers[row["index"]], row["answer"].strip("[]'")
        if url := task.get("judge_url"):
            right += ask(url, task["judge_model"], f"{answer} = {reference}?") == "1"
        else:
            right += answer == reference
    share = 100 * right / len(rows)
    metrics = {
        "WeMath": {"strict": share / 2, "loose": share},
        "HallusionBench": {"aAcc": share, "fAcc": share / 2, "qAcc": share / 4},
        "OCRBench": {"final_score": float(right)},
    }.get(task["dataset"], {"accuracy": share})
    scores = {"metrics": metrics, "num_examples": len(rows), "evaluator": "stand-in"}
    return json.dumps(scores | {"judge_model": task.get("judge_model")})


for text in Path(sys.argv[1]).read_text().splitlines():
    given = json.loads(text)
    with (DATA / f"{given['dataset']}.tsv").open() as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    Path(given["out"]).write_text((export if given["task"] == "questions" else score)(given, found))
