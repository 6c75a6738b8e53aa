"""Installs and calls the official evaluator: a subprocess in an environment of its own, never imported.

The contract is the command line and the files of vlmeval_runner.py; `--evaluator` may name another program with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vaopd.benchmarks_eval.catalogue import Benchmark
from vaopd.benchmarks_eval.results import RunScore
from vaopd.errors import ChildFailed, ConfigError, InvalidInput
from vaopd.launch.supervisor import Child, Supervisor

REQUIREMENTS = ("ms-vlmeval==0.0.20", "pandas<3")
"""VLMEvalKit; docs/decisions says why. Its WeMath calls `DataFrame._append`, which pandas 3 no longer has."""

_RUNNER = Path(__file__).with_name("vlmeval_runner.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """An OpenAI-compatible judge, e.g. http://127.0.0.1:8000/v1; its key is in OPENAI_API_KEY."""

    url: str
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """How to start the evaluator. command: up to the task's name. data: the folder of its data sets."""

    command: Sequence[str]
    data: Path
    logs: Path
    say: Callable[[str], None]

    def export_questions(self, benchmark: Benchmark, out: Path) -> None:
        """Writes the benchmark's questions. Raises ChildFailed with the end of the evaluator's log."""
        self._run("questions", benchmark, out, [])

    def score(
        self, benchmark: Benchmark, answers: Mapping[str, str], out: Path, *, sample: int, judge: Judge | None
    ) -> RunScore:
        """Has one run scored, unless `out` has that score, by the same judge.

        answers: one for every question, by its id. Raises ChildFailed if the evaluator fails, InvalidInput or
        NumericalError for a score that is not one.
        """
        used = judge if benchmark.judged else None
        if not out.exists() or json.loads(out.read_text()).get("judge_model") != (used.model if used else None):
            with tempfile.TemporaryDirectory(prefix="vaopd-benchmark-") as folder:
                file = Path(folder) / "answers.jsonl"
                lines = (json.dumps({"id": name, "answer": answer}) + "\n" for name, answer in answers.items())
                file.write_text("".join(lines))
                options = ["--answers", str(file)]
                options += ["--judge-url", used.url, "--judge-model", used.model] if used else []
                self._run("score", benchmark, out, options)
        found = json.loads(out.read_text())
        if found.get("num_examples") != len(answers):
            raise InvalidInput(
                f"{out}: num_examples is {found.get('num_examples')}, and {len(answers)} were answered; delete the file"
            )
        return RunScore(sample=sample, num_examples=len(answers), metrics=benchmark.check(found.get("metrics", {})))

    def _run(self, task: str, benchmark: Benchmark, out: Path, options: Sequence[str]) -> None:
        argv = [*self.command, task, "--dataset", benchmark.dataset, "--split", benchmark.split, "--out", str(out)]
        # Our own packages must not be found there: it pins others.
        environment = {"PYTHONPATH": "", "LMUData": str(self.data)}
        name = f"evaluator-{benchmark.name}"
        self.data.mkdir(parents=True, exist_ok=True)
        with Supervisor(logs=self.logs, say=self.say) as supervisor:
            supervisor.start(Child(name=name, argv=(*argv, *options), environment=environment, restarts=0))
            if code := supervisor.run_until_exit(name):
                raise ChildFailed(f"the evaluator ended with code {code}; {supervisor.log_tail(name)}")
        if not out.exists():
            raise ChildFailed(f"the evaluator wrote no {out}; see {self.logs / name}.log")


def find_command(environment: Path) -> list[str]:
    """Returns the command of the installed evaluator; raises ConfigError where it isn't installed."""
    python = environment / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"no evaluator in {environment}; `vaopd eval --install` makes it (docs/benchmarks.md)")
    return [str(python), str(_RUNNER)]


def install(environment: Path, *, say: Callable[[str], None]) -> None:
    """Makes the evaluator's environment and installs it with pip. Raises ConfigError when pip fails."""
    say(f"installing {' '.join(REQUIREMENTS)} into {environment}; with its torch that is several GB")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", *REQUIREMENTS]
    for step in ([sys.executable, "-m", "venv", str(environment)], pip):
        if code := subprocess.run(step, check=False).returncode:
            raise ConfigError(f"`{' '.join(step)}` ended with code {code}; nothing else was changed")
    say("installed")
