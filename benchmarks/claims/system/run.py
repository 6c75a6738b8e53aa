"""Trains students under each objective on the whole system (`make claims`): teacher, vLLM, Redis, trainer.

Each run is a `vaopd up` of configs/claims.toml; runs share one teacher process. When a run is finished, its student
answers validation and test pictures in this process, and a line is added to the results: an interrupted comparison
continues after the last one. What is run, and in which order, is table.py.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from table import ARMS, PROBLEMS, TEACHERS, Run, list_runs

from vaopd.data import handwritten_cards
from vaopd.files.durable import write_atomic
from vaopd.report import read_run
from vaopd.tiny.cards import measure_cards
from vaopd.tiny.pretrain import make
from vaopd.vlm.torchvision_compat import ensure_torchvision

ROOT = Path(__file__).parents[3]
CONFIG, RESULTS, FOLDER = "configs/claims.toml", ROOT / "benchmarks/results/claims/system.json", Path("runs/claims")
VAOPD = (sys.executable, "-m", "vaopd.cli")
PICTURES = 256
TEACHER_TIMEOUT_S = 300.0
DURING = (
    *("kl_mean", "kl_high", "kl_unseen_share", "va_spread", "high_ties_share", "weights_entropy", "grad_norm"),
    *("response_tokens_mean", "step_s", "wait_s"),
)
"""Numbers of metrics.jsonl whose mean over the steps is kept."""


@contextmanager
def serve_teacher(name: str) -> Iterator[str]:
    """Runs a teacher for several runs and yields its address."""
    with tempfile.TemporaryDirectory(prefix="vaopd-claims-") as folder:
        announced, log = Path(folder) / "address", FOLDER / f"{name}.log"
        settings = (f"teacher.model={find_teacher(name)}", "teacher.address=127.0.0.1:0")
        command = [*VAOPD, "teacher", CONFIG, *_set(settings), "--announce", str(announced)]
        with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                deadline = time.monotonic() + TEACHER_TIMEOUT_S
                while not announced.exists():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"the teacher {name} doesn't serve; {log} says why")
                    time.sleep(0.2)
                yield announced.read_text().strip()
            finally:
                process.terminate()


def find_teacher(name: str) -> Path:
    """Returns a teacher's folder; one that isn't shipped is trained first, in about ten minutes."""
    shipped, made = ROOT / "models" / name, FOLDER / name
    if shipped.is_dir():
        return shipped
    if not (made / "training.json").exists():
        make(name.removeprefix("tiny-"), made)
    return made


def train(run: Run, teacher: str) -> Path:
    """Trains a student and returns the run's folder; what an interrupted attempt has left is begun again."""
    folder = FOLDER / run.name
    if (folder / "model").is_dir():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    objective = [f"objective.{key}={value}" for key, value in ARMS[run.arm].items()]
    settings = (f"run.name={run.name}", f"run.folder={FOLDER}", f"run.seed={run.seed}", *objective)
    settings += (f"trainer.learning_rate={run.rate}", f"data.source={make_data(run.problems)}")
    command = [*VAOPD, "up", CONFIG, "--no-api", "--teacher", teacher, *_set(settings)]
    log = FOLDER / f"{run.name}.log"
    with log.open("wb") as output:
        if code := subprocess.call(command, stdout=output, stderr=output):
            raise SystemExit(f"{run.name} ended with exit code {code}; {log} says why")
    return folder


def make_data(problems: int) -> Path:
    """Returns the data set with so many training problems, the first ones of the largest; draws it if need be."""
    folder = Path("data/handwritten-cards" if problems == PROBLEMS[0] else f"data/handwritten-cards-{problems}")
    if not folder.exists():
        handwritten_cards.write(folder, seed=0, train=problems, validation=300, test=600)
    return folder


def measure(model: Path, teacher: str) -> dict[str, dict[str, float]]:
    """Measures a student on validation and test pictures."""
    ensure_torchvision()
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    load = Qwen3VLForConditionalGeneration.from_pretrained
    student, processor, judge = load(model), AutoProcessor.from_pretrained(model), load(find_teacher(teacher))
    return {
        split: measure_cards(student, processor, num_questions=PICTURES, teacher=judge, split=split)  # type: ignore[arg-type]
        for split in ("validation", "test")
    }


def summarise(folder: Path) -> dict[str, Any]:
    """Returns a run's evaluations, and the means of its steps."""
    run = read_run(folder)
    evaluations = [
        {"step": e.step, "accuracy": e.accuracy, "student_va": e.student_va and e.student_va.mean}
        for e in run.evaluations
    ]
    means = {name: statistics.fmean(values) for name in DURING if (values := run.list_series(name)[1])}
    return {"evaluations": evaluations, "during": means}


def tidy(value: Any, name: str = "") -> Any:
    """Rounds all numbers but rates to 4 decimals, and writes NaN as null."""
    if isinstance(value, dict):
        return {key: tidy(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [tidy(inner) for inner in value]
    if not isinstance(value, float) or name == "rate":
        return value
    return None if math.isnan(value) else round(value, 4)


def write_results(results: dict[str, Any], path: Path) -> None:
    """Replaces the results, one run on each line."""
    lines = ",\n".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    write_atomic(path, f'{{"before": {json.dumps(results["before"])}, "runs": [\n{lines}\n]}}\n')


def identify(line: dict[str, Any]) -> Run:
    """Returns the run that a line of the results is of."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def _set(settings: Sequence[str]) -> list[str]:
    return [argument for value in settings for argument in ("--set", value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arm", action="append", choices=ARMS, help="these arms' runs only")
    parser.add_argument("--rate", action="append", type=float, help="runs with these learning rates only")
    parser.add_argument("--seed", action="append", type=int, help="runs of these seeds only")
    parser.add_argument("--teacher", action="append", choices=TEACHERS, help="runs under these teachers only")
    parser.add_argument("--problems", action="append", type=int, choices=PROBLEMS, help="runs on such data only")
    parser.add_argument("--stop-after-s", type=float, default=math.inf, help="begin no run after so many seconds")
    options = parser.parse_args()
    wanted = {name: chosen for name in Run.__dataclass_fields__ if (chosen := getattr(options, name))}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, it ends teacher and run too
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"before": {}, "runs": []}
    started, served = time.perf_counter(), ""
    with ExitStack() as serving:
        while time.perf_counter() - started < options.stop_after_s:
            done = {identify(line): line for line in results["runs"]}
            runs = dict.fromkeys(run for run in list_runs(done) if all(getattr(run, n) in c for n, c in wanted.items()))
            missing = [run for run in runs if run not in done]
            took = statistics.fmean(line["minutes"] for line in results["runs"]) if done else 4.0
            print(
                f"{len(runs) - len(missing)} of {len(runs)} runs; about {took * len(missing):.0f} min left", flush=True
            )
            if not missing:
                break
            run, began = missing[0], time.perf_counter()
            if run.teacher != served:
                serving.close()
                address, served = serving.enter_context(serve_teacher(run.teacher)), run.teacher
            if run.teacher not in results["before"]:
                results["before"][run.teacher] = measure(Path("models/tiny-cards-student"), run.teacher)
            folder = train(run, address)
            line = vars(run) | summarise(folder) | measure(folder / "model", run.teacher)
            line["minutes"] = (time.perf_counter() - began) / 60
            results["runs"].append(tidy(line))
            write_results(results, RESULTS)
            print(f"{run.name}: {line['test']} in {line['minutes']:.1f} min", flush=True)


if __name__ == "__main__":
    main()
