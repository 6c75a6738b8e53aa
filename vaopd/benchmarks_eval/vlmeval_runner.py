"""The evaluator's program: runs in the evaluator's environment, where ms-vlmeval is, and never in ours.

    PYTHON vlmeval_runner.py TASKS

Each line of the file TASKS is a task; they are done in order, and none leaves a part of its "out" behind:

    {"task": "questions", "dataset": NAME, "split": NAME, "out": questions.jsonl}
    {"task": "score", "dataset": NAME, "split": NAME, "out": score.json, "answers": answers.jsonl, "sample": 0,
     "judge_url": URL, "judge_model": NAME}                                           the last two for a judged one

`questions` writes {"id", "parts": [{"type": "image" | "text", "value"}]} per line. `score` reads {"question", "sample",
"answer"} per line, those of its sample, one to every question, and writes {"metrics", "num_examples", "evaluator",
"judge_model"}. LMUData names the folder of the data sets; a NAME.tsv there is used as it is, and a missing one is
downloaded. It imports only the standard library and ms-vlmeval.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

FAILED = "Failed to obtain answer via API"
FAILURES: list[str] = []
KINDS = ("strict", "loose")


def main() -> None:
    """Does the tasks of a file."""
    _prepare()  # imports the evaluator without a task too: this is how an installation is tried
    for line in Path(sys.argv[1]).read_text().splitlines():
        task = json.loads(line)
        dataset = _load(task["dataset"], task["split"])
        if task["task"] == "questions":
            questions = (_make_question(dataset, row) for _, row in dataset.data.iterrows())
            _write(Path(task["out"]), "".join(json.dumps(question) + "\n" for question in questions))
        else:
            _write(Path(task["out"]), json.dumps(_score(dataset, task)))


def _prepare() -> None:
    """Changes what would end a correct evaluation, score by chance, or write the judge's key into the log."""
    from vlmeval.api import OpenAIWrapper, gpt
    from vlmeval.dataset.utils import multiple_choice, wemath

    gpt.logger.setLevel("WARNING")  # at INFO it prints the key
    ask, count = OpenAIWrapper.generate, wemath.evaluate_compute_final_scores

    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        answer = ask(self, *arguments, **options)
        if FAILED in str(answer):
            FAILURES.append(str(answer))
        return answer

    def count_without_mastery(metrics: dict[str, Any], total_count: int) -> Any:
        """Stands a problem in for none solved: else the rate of rote memorization, which no score reads, is 0 / 0."""
        try:
            return count(metrics, total_count)
        except ZeroDivisionError:
            return count(metrics | {f"steps2_filtered_rows_4_{kind}": [None] for kind in KINDS}, total_count)

    # What no reply of the judge names is no option, as it is under rules; the evaluator would choose one by chance.
    multiple_choice.rd = types.SimpleNamespace(choice=lambda options: "Z")
    OpenAIWrapper.generate = generate
    wemath.evaluate_compute_final_scores = count_without_mastery


@functools.lru_cache(maxsize=1)
def _load(name: str, split: str) -> Any:
    from vlmeval import dataset as module
    from vlmeval.smp import LMUDataRoot

    cls = next(cls for cls in module.DATASET_CLASSES if name in cls.supported_datasets())
    file = Path(LMUDataRoot()) / f"{name}.tsv"
    digest = cls.DATASET_MD5.pop(name, None)  # by itself it would replace a file with another one
    if not file.exists():
        _download(cls.DATASET_URL[name], digest, file)
    dataset = module.build_dataset(name)
    if name == "MMMU_DEV_VAL":  # the only file with a split that the paper does not use
        dataset.data = dataset.data[dataset.data["split"] == split].reset_index(drop=True)
    return dataset


def _download(url: str, digest: str | None, file: Path) -> None:
    """Downloads a data set and compares its digest. The evaluator doesn't, nor does it check certificates."""
    from vlmeval.smp.file import download_file, md5

    part = file.with_name(f".{file.name}.part")
    download_file(url, str(part))
    if (found := md5(str(part))) != digest:
        sys.exit(f"{url} has the digest {found}, and the evaluator names {digest}; put {file} there by hand")
    part.replace(file)


def _make_question(dataset: Any, row: Any) -> dict[str, Any]:
    parts = [{"type": part["type"], "value": str(part["value"])} for part in dataset.build_prompt(row)]
    return {"id": str(row["index"]), "parts": parts}


def _score(dataset: Any, task: dict[str, Any]) -> dict[str, Any]:
    with open(task["answers"], encoding="utf-8") as answers:
        lines = [line for line in map(json.loads, answers) if line["sample"] == task["sample"]]
    given = {line["question"]: line["answer"] for line in lines}
    data = dataset.data.drop(columns=["image"], errors="ignore").copy()
    ids = [str(index) for index in data["index"]]
    if set(ids) != set(given) or len(ids) != len(given):
        sys.exit(
            f"{len(given)} answers to {len(ids)} questions of {dataset.dataset_name}, and the ids must be the same"
        )
    data["prediction"] = [given[index] for index in ids]
    url, model = task.get("judge_url"), task.get("judge_model")
    if dataset.dataset_name.startswith("MathVerse"):
        metrics = _score_mathverse(data)
    else:
        with tempfile.TemporaryDirectory(prefix="vaopd-vlmeval-") as folder:
            os.environ["PRED_FORMAT"] = "tsv"  # Excel refuses more than 32767 characters in a cell
            file = f"{folder}/answers.tsv"
            data.to_csv(file, sep="\t", index=False, encoding="utf-8")
            metrics = _read_metrics(dataset.dataset_name, _evaluate(dataset, file, url, model))
    evaluator = f"ms-vlmeval {importlib.metadata.version('ms-vlmeval')}"
    return {"metrics": metrics, "num_examples": len(ids), "evaluator": evaluator, "judge_model": model}


def _evaluate(dataset: Any, file: str, url: str | None, model: str | None) -> Any:
    """Returns the evaluator's own result. Exits if the judge did not answer: it would score by chance.

    The judge is named by LOCAL_LLM: the evaluator would write the name that it is given into those of files.
    """
    if url is None or model is None:
        return dataset.evaluate(file, model="exact_matching", nproc=1)
    from vlmeval.dataset.utils import build_judge

    os.environ |= {"OPENAI_API_BASE": url.rstrip("/") + "/chat/completions", "LOCAL_LLM": model}
    os.environ.setdefault("OPENAI_API_KEY", "none")
    if not build_judge(model="judge").working():
        sys.exit(f"the judge {model} at {url} does not answer; check --judge-url and OPENAI_API_KEY")
    FAILURES.clear()
    result = dataset.evaluate(file, model="judge", nproc=4)
    if FAILURES:
        sys.exit(f"the judge at {url} failed to answer {len(FAILURES)} times; run the same command again")
    return result


def _score_mathverse(data: Any) -> dict[str, float]:
    """Applies the benchmark's own rule, its scorer's --quick_match: the answer equals the reference as text.

    The evaluator's default needs a judge to extract and compare; the paper used rules for this benchmark.
    """
    from vlmeval.dataset.utils.mathverse import post_check_score

    pairs = zip(data["answer"], data["prediction"], strict=True)
    right = sum(post_check_score({"answer": answer, "extract": given}) for answer, given in pairs)
    return {"accuracy": 100 * right / len(data)}


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
        return {kind: float(result.iloc[0][f"Score ({kind.title()})"].rstrip("%")) for kind in KINDS}
    if len(result) != 1:
        sys.exit(f"{name}: the evaluator reported {len(result)} splits, and one was given")
    return {"accuracy": 100 * float(result.iloc[0]["Overall"])}


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


if __name__ == "__main__":
    main()
