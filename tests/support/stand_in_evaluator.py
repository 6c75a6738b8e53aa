"""Stands in for the official evaluator, with the command line and files of vaopd/benchmarks_eval/vlmeval_runner.py.

Scores by the text of the answer. A judged benchmark asks the judge once per answer: "1" is right.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import os
import sys
import urllib.request
from pathlib import Path

csv.field_size_limit(sys.maxsize)


def ask(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


parser = argparse.ArgumentParser()
parser.add_argument("task")
for name in ("--dataset", "--split", "--out", "--answers", "--judge-url", "--judge-model"):
    parser.add_argument(name)
given = parser.parse_args()
data = Path(os.environ["LMUData"])  # noqa: SIM112
with (data / f"{given.dataset}.tsv").open() as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

if given.task == "questions":
    lines = []
    for row in rows:
        image = data / f"{given.dataset}-{row['index']}.png"
        image.write_bytes(base64.b64decode(row["image"]))
        parts = [{"type": "image", "value": str(image)}, {"type": "text", "value": row["question"]}]
        lines.append(json.dumps({"id": row["index"], "parts": parts}) + "\n")
    Path(given.out).write_text("".join(lines))
    sys.exit()

answers = {line["id"]: line["answer"] for line in map(json.loads, Path(given.answers).read_text().splitlines())}
assert set(answers) == {row["index"] for row in rows}
right = 0
for row in rows:
    if given.judge_url:
        right += ask(given.judge_url, given.judge_model, f"{answers[row['index']]} = {row['answer']}?") == "1"
    else:
        right += answers[row["index"]] == (
            json.loads(row["answer"].replace("'", '"'))[0] if "[" in row["answer"] else row["answer"]
        )
share = 100 * right / len(rows)
metrics = {
    "WeMath": {"strict": share / 2, "loose": share},
    "HallusionBench": {"aAcc": share, "fAcc": share / 2, "qAcc": share / 4},
    "OCRBench": {"final_score": float(right)},
}.get(given.dataset, {"accuracy": share})
scores = {"metrics": metrics, "num_examples": len(rows), "evaluator": "stand-in", "judge_model": given.judge_model}
Path(given.out).write_text(json.dumps(scores))
