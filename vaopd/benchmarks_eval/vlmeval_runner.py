"""The evaluator's program: runs in the evaluator's environment, where ms-vlmeval is, and never in ours.

    PYTHON vlmeval_runner.py questions --dataset NAME --split NAME --out questions.jsonl
    PYTHON vlmeval_runner.py score --dataset NAME --split NAME --answers answers.jsonl --out score.json
        [--judge-url URL --judge-model NAME]

`questions` writes {"id", "parts": [{"type": "image" | "text", "value"}]} per line. `score` reads {"id", "answer"} per
line, one answer to every question, and writes {"metrics", "num_examples", "evaluator", "judge_model"}. LMUData names
the folder of the data sets; a NAME.tsv there is used as it is, and a missing one is downloaded. Exit code 0: `--out` is
complete. It imports only the standard library and ms-vlmeval.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAILED = "Failed to obtain answer via API"


def main() -> None:
    """Writes the questions or the scores of a data set."""
    parser = argparse.ArgumentParser(prog="vlmeval_runner")
    parser.add_argument("task", choices=("questions", "score"))
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--judge-url")
    parser.add_argument("--judge-model")
    arguments = parser.parse_args()
    dataset = _load(arguments.dataset, arguments.split)
    if arguments.task == "questions":
        lines = [_make_question(dataset, index) for index in range(len(dataset.data))]
        _write(arguments.out, "".join(json.dumps(line) + "\n" for line in lines))
        return
    scores = _score(dataset, arguments.answers, arguments.judge_url, arguments.judge_model)
    _write(arguments.out, json.dumps(scores))


def _load(name: str, split: str) -> Any:
    from vlmeval import dataset as module
    from vlmeval.smp import LMUDataRoot

    if (Path(LMUDataRoot()) / f"{name}.tsv").exists():  # it would replace a file with another digest
        for cls in module.DATASET_CLASSES:
            if name in cls.supported_datasets():
                cls.DATASET_MD5 = {}
    dataset = module.build_dataset(name)
    if name == "MMMU_DEV_VAL":  # the only file with a split that the paper does not use
        dataset.data = dataset.data[dataset.data["split"] == split].reset_index(drop=True)
    return dataset


def _make_question(dataset: Any, index: int) -> dict[str, Any]:
    row = dataset.data.iloc[index]
    parts = [{"type": part["type"], "value": str(part["value"])} for part in dataset.build_prompt(row)]
    return {"id": str(row["index"]), "parts": parts}


def _score(dataset: Any, answers: Path, judge_url: str | None, judge_model: str | None) -> dict[str, Any]:
    given = {line["id"]: line["answer"] for line in map(json.loads, answers.read_text().splitlines())}
    data = dataset.data.drop(columns=["image"], errors="ignore").copy()
    ids = [str(index) for index in data["index"]]
    if set(ids) != set(given) or len(ids) != len(given):
        sys.exit(
            f"{len(given)} answers to {len(ids)} questions of {dataset.dataset_name}, and the ids must be the same"
        )
    data["prediction"] = [given[index] for index in ids]
    with tempfile.TemporaryDirectory(prefix="vaopd-vlmeval-") as folder:
        os.environ["PRED_FORMAT"] = "tsv"  # Excel refuses more than 32767 characters in a cell
        file = f"{folder}/answers.tsv"
        data.to_csv(file, sep="\t", index=False, encoding="utf-8")
        if dataset.dataset_name.startswith("MathVerse"):
            metrics = _score_mathverse(file)
        else:
            metrics = _read_metrics(dataset.dataset_name, _evaluate(dataset, file, judge_url, judge_model))
    version = importlib.metadata.version("ms-vlmeval")
    used = judge_model if judge_url else None
    return {"metrics": metrics, "num_examples": len(ids), "evaluator": f"ms-vlmeval {version}", "judge_model": used}


def _evaluate(dataset: Any, file: str, judge_url: str | None, judge_model: str | None) -> Any:
    """Returns the official evaluator's own result. Exits if the judge did not answer: it would score by chance."""
    if judge_url is None:
        return dataset.evaluate(file, model="exact_matching", nproc=1)
    from vlmeval.api import OpenAIWrapper
    from vlmeval.dataset.utils import build_judge

    os.environ["OPENAI_API_BASE"] = judge_url.rstrip("/") + "/chat/completions"
    os.environ.setdefault("OPENAI_API_KEY", "none")
    failures: list[str] = []
    ask = OpenAIWrapper.generate

    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        answer = ask(self, *arguments, **options)
        if FAILED in str(answer):
            failures.append(str(answer))
        return answer

    OpenAIWrapper.generate = generate
    if not build_judge(model=judge_model).working():
        sys.exit(f"the judge {judge_model} at {judge_url} does not answer; check --judge-url and OPENAI_API_KEY")
    failures.clear()
    result = dataset.evaluate(file, model=judge_model, nproc=4)
    if failures:
        sys.exit(f"the judge at {judge_url} failed to answer {len(failures)} times; run the same command again")
    return result


def _score_mathverse(file: str) -> dict[str, float]:
    """Applies the evaluator's own rule to the committed answers: equal to the reference as text.

    Its default needs a judge to extract and compare; the paper used rules for this benchmark.
    """
    from vlmeval.dataset.utils.mathverse import post_check_score
    from vlmeval.smp import load

    right = [
        post_check_score({"answer": row["answer"], "extract": row["prediction"]}) for _, row in load(file).iterrows()
    ]
    return {"accuracy": 100 * sum(right) / len(right)}


def _read_metrics(name: str, result: Any) -> dict[str, float]:
    """Reads our metrics from what `evaluate` returned: a dictionary, or a data frame with a row per split or task."""
    if name == "OCRBench":
        return {"final_score": float(result["Final Score"])}
    if name == "HallusionBench":
        row = result[result["split"] == "Overall"].iloc[0]
        return {metric: float(row[metric]) for metric in ("aAcc", "fAcc", "qAcc")}
    if name == "MathVista_MINI":
        return {"accuracy": float(result[result["Task&Skill"] == "Overall"].iloc[0]["acc"])}
    if name == "WeMath":
        row = result.iloc[0]
        return {key: _read_percent(row, f"Score ({key.title()})") for key in ("strict", "loose")}
    if len(result) != 1:
        sys.exit(f"{name}: the evaluator reported {len(result)} splits, and one was given")
    return {"accuracy": 100 * float(result.iloc[0]["Overall"])}


def _read_percent(row: Mapping[str, Any], key: str) -> float:
    return float(str(row[key]).rstrip("%"))


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


if __name__ == "__main__":
    main()
