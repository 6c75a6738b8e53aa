"""The whole system as real processes on free ports of the loopback: Valkey, one teacher, and any number of jobs, each a
trainer with its own rollout workers (transformers engine, tiny models).

with System(tmp_path) as system:
    job = system.job("alpha", trainer__steps=4)
    job.start_worker()
    trainer = job.start_trainer()
    job.finished(trainer)
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis

from tests.support import preloaded
from tests.support.models import model_folder
from tests.support.waiting import wait_until
from vaopd.launch.up import make_service_argv
from vaopd.queue.embedded import EmbeddedRedis

_ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 600.0  # of a whole run on a busy machine; nothing waits that long in a run that is well
# Steps of four small groups, and a lease that a dead process loses soon. Sampling is seeded by the run and the group
# only, so that two jobs with one seed and one student draw the same rollouts.
_DEFAULTS: dict[str, Any] = {
    "trainer.steps": 4,
    "trainer.prompts_per_step": 4,
    "trainer.rollouts_per_prompt": 2,
    "trainer.checkpoint_every": 2,
    "trainer.warmup_fraction": 0.0,
    "trainer.trackers": "[]",
    "rollout.engine": "transformers",
    "rollout.max_new_tokens": 12,
    "rollout.requests_per_batch": 2,
    "evaluation.every": 0,
    "evaluation.prompts": 2,
    "queue.lease_s": 2.0,
}


class Process:
    """A process in a session of its own, so that whatever it starts can be found and ended with it."""

    def __init__(self, argv: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self._popen = preloaded.start(argv, log=log, environment=os.environ | preloaded.QUIET | environment)

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to it and to its children, as a machine that dies would do."""
        if not self.gone():
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        wait_until(f"no process of {self.log.stem} is left", self.gone)

    def kill_rank(self, rank: int, *, world: int) -> int:
        """SIGKILL to one rank when rank 0 has stopped at a point (`stop_at`); the others go on -> the exit code."""

        def find_ranks() -> list[int]:
            """The process itself, or the children that it has started in the order of their ranks."""
            children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children").read_text()
            return list(map(int, children.split())) if world > 1 else [self._popen.pid]

        def has_stopped() -> bool:
            assert self.returncode is None, self.text()[-4000:]
            ranks = find_ranks()
            return (
                len(ranks) == world and Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[0] == "T"
            )

        wait_until(f"{self.log.stem} stops", has_stopped, timeout_s=_TIMEOUT_S)
        os.kill(find_ranks()[rank], signal.SIGKILL)
        os.killpg(self._popen.pid, signal.SIGCONT)
        return self.exit_code()

    def exit_code(self) -> int:
        wait_until(f"{self.log.stem} ends", lambda: self.returncode is not None, timeout_s=_TIMEOUT_S)
        assert self._popen.returncode is not None
        return self._popen.returncode

    def gone(self) -> bool:
        self._popen.poll()
        try:
            os.killpg(self._popen.pid, 0)
        except ProcessLookupError:
            return True
        return False


class Job:
    """One run: its configuration, its processes, and what it leaves in its folder and in Redis."""

    def __init__(self, system: System, name: str, settings: dict[str, Any]) -> None:
        self.system = system
        self.name = name
        self.folder = system.folder / "runs" / name
        self.overrides = [f"{key}={value}" for key, value in settings.items()]

    def start_trainer(
        self, *, resume: bool = False, kill_at: str = "", stop_at: str = "", launch: tuple[str, ...] = ()
    ) -> Process:
        """`kill_at`, `stop_at`: POINT:STEP at which it dies or freezes, see `vaopd_trainer.kill_points`.

        `launch`: what Python is given in place of `-m vaopd_trainer`.
        """
        arguments = ("--resume",) if resume else ()
        environment = {"VAOPD_KILL_AT": kill_at, "VAOPD_STOP_AT": stop_at}
        return self.system.start(
            "trainer", self.name, self.overrides, *arguments, environment=environment, launch=launch
        )

    def start_worker(self, name: str = "w0", *arguments: str) -> Process:
        name = f"{self.name}-{name}"
        return self.system.start("rollout", name, self.overrides, "--worker", name, *arguments)

    def run(self) -> None:
        """The whole run, undisturbed."""
        worker = self.start_worker()
        self.finished(self.start_trainer())
        worker.kill()

    def finished(self, trainer: Process) -> None:
        assert trainer.exit_code() == 0, trainer.text()[-4000:]

    def until(self, what: str, condition: Callable[[], object], *alive: Process) -> None:
        """Waits for something that is seen in the run's folder or in Redis; the given processes must live meanwhile."""

        def reached() -> bool:
            for process in alive:
                assert process.returncode is None, process.text()[-4000:]
            return bool(condition())

        wait_until(what, reached, timeout_s=_TIMEOUT_S)

    def records(self, kind: str = "train") -> list[dict[str, Any]]:
        return [record for record in read_lines(self.folder / "metrics.jsonl") if record["kind"] == kind]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records()]

    def samples(self) -> list[dict[str, Any]]:
        """The rollouts of the steps at which evaluation was due."""
        return read_lines(self.folder / "samples.jsonl")

    def rollouts(self) -> dict[str, list[str]]:
        """rollout_id → its tokens, of the same steps."""
        return {record["rollout_id"]: record["tokens"] for record in self.samples()}

    def ledger(self) -> list[dict[str, Any]]:
        """Of the newest checkpoint."""
        newest = max((self.folder / "checkpoints").glob("step_*"), default=None)
        return read_lines(newest / "ledger.jsonl") if newest else []

    def weights(self) -> bytes:
        return (self.folder / "model" / "model.safetensors").read_bytes()

    def stream_length(self, stream: str) -> int:
        """Entries of "requests", "groups" or "dead" that are still in Redis."""
        with redis.Redis.from_url(self.system.redis.url) as client:
            return client.xlen(f"vaopd:{{{self.name}}}:{stream}")

    def holds_a_request(self) -> bool:
        """Whether a worker has a request under a lease now."""
        with redis.Redis.from_url(self.system.redis.url) as client:
            return client.xpending(f"vaopd:{{{self.name}}}:requests", "rollout")["pending"] > 0

    def kill_in_mid_batch(self, worker: Process) -> None:
        """SIGKILL to the job's only worker while it holds a request; it is frozen first, to be sure."""

        def is_caught() -> bool:
            if not self.holds_a_request():
                return False
            worker.send(signal.SIGSTOP)
            if self.holds_a_request():
                return True
            worker.send(signal.SIGCONT)
            return False

        self.until("the worker holds a request", is_caught, worker)
        worker.kill()

    def pending(self) -> dict[str, int]:
        """What a finished run must not leave: requests and groups, delivered or not."""
        return {stream: self.stream_length(stream) for stream in ("requests", "groups")}


class System:
    """Valkey and a teacher from entry to exit; every process it started is gone afterwards, or the exit fails."""

    def __init__(self, folder: Path, *, problems: int = 64, teacher: str = "teacher", seed: int = 0) -> None:
        self.folder = folder
        self.redis = EmbeddedRedis()
        self.data = folder / "data"
        self._problems = problems
        self.teacher_model = model_folder(teacher)
        """What the next teacher serves."""
        self._seed = seed
        self._stack = ExitStack()
        self._processes: list[Process] = []
        self.address = "127.0.0.1:0"

    def __enter__(self) -> System:
        from vaopd.data.handwritten_geometry import write

        with self._stack:
            write(self.data, seed=self._seed, train=self._problems, validation=8, test=0)
            self._stack.enter_context(self.redis)
            self._stack.callback(self._end_processes)
            self.teacher = self.start_teacher()
            self._kept = self._stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept.close()
        left = [process.log.stem for process in self._processes if not process.gone()]
        assert not left, f"still running: {left}"

    def start_teacher(self) -> Process:
        """The first takes a free port; those that follow it take the same one."""
        announce = self.folder / "teacher.address"
        announce.unlink(missing_ok=True)
        self.teacher = self.start("teacher", "teacher", self._settings("teacher"), "--announce", str(announce))

        def serves() -> bool:
            assert self.teacher.returncode is None, self.teacher.text()[-4000:]
            return announce.exists()

        wait_until("the teacher serves", serves, timeout_s=_TIMEOUT_S)
        self.address = announce.read_text().strip()
        return self.teacher

    def start_api(self) -> tuple[Process, str]:
        """The process and its host:port."""
        announce = self.folder / "api.address"
        overrides = [*self._settings("api"), "api.address=127.0.0.1:0"]
        process = self.start("api", "api", overrides, "--announce", str(announce))
        wait_until("the API listens", announce.exists, timeout_s=_TIMEOUT_S)
        return process, announce.read_text()

    def job(self, name: str, *, student: Path | None = None, **settings: Any) -> Job:
        """`settings`: SECTION__KEY=VALUE, over small defaults."""
        named = {key.replace("__", "."): value for key, value in settings.items()}
        defaults = dict(item.split("=", 1) for item in self._settings(name))
        if student is not None:
            defaults["student.model"] = str(student)
        return Job(self, name, {**defaults, **_DEFAULTS, **named})

    def start(
        self,
        role: str,
        name: str,
        overrides: list[str],
        *arguments: str,
        environment: dict[str, str] | None = None,
        launch: tuple[str, ...] = (),
    ) -> Process:
        argv = make_service_argv(role, _ROOT / "configs" / "tiny.toml", overrides, *arguments)
        if launch:
            assert argv[1] == "-m"
            argv = (argv[0], *launch, *argv[3:])
        return self.keep(Process(argv, self.folder / f"{name}.{role}.log", environment or {}))

    def keep(self, process: Process) -> Process:
        """Ends it at the exit."""
        self._processes.append(process)
        return process

    def _settings(self, name: str) -> list[str]:
        return [
            f"run.name={name}",
            f"run.folder={self.folder / 'runs'}",
            f"data.source={self.data}",
            f"student.model={model_folder('student')}",
            f"teacher.model={self.teacher_model}",
            f"teacher.address={self.address}",
            # Each row in a forward of its own: which groups arrive together then shows in no bit of the scores.
            "teacher.batch_tokens=1",
            f"queue.url={self.redis.url}",
        ]

    def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file that may still be written to, or not be there yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
