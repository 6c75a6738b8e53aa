"""`vaopd up`: starts every process of a run on one host, in the order in which they need each other.

    Redis (when queue.url = "embedded") ──► rollout workers, which are slow to start, and the teachers
    the teachers' addresses, once they serve ──► trainer and API
    trainer's exit ──► everything ends, with the trainer's exit code

Each process is one of `services/`, with the same configuration and the addresses of those before it. Restarts, signals
and the end of all processes are `vaopd.launch.supervisor`'s.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vaopd.config import Config, HttpWeights, load_config, load_service_config
from vaopd.config.run import QUEUE_PASSWORD, QUEUE_PASSWORD_FILE
from vaopd.errors import ConfigError, Interrupted, VaopdError
from vaopd.files.durable import write_atomic
from vaopd.launch.checks import find_port_problems
from vaopd.launch.resume import check_start, write_launch
from vaopd.launch.supervisor import STEADY_S, Child, Supervisor
from vaopd.launch.teacher import check_credentials, check_ranks, count_ranks, describe_teacher
from vaopd.net.passwords import remove_passwords
from vaopd.net.ports import LOOPBACK, free_port, join_address
from vaopd.process import entry
from vaopd.run.owner import LAUNCHER, UP, own
from vaopd.run.status import StatusWriter

TEACHER_TIMEOUT_S = 1800.0  # a 32B teacher is read from disk first
API_TIMEOUT_S = 60.0
REDIS_TIMEOUT_S = 30.0
TRAINER_GRACE_S = 300.0  # it finishes the step in hand and checkpoints; a second signal ends it at once
AFTER_DRAIN_S = 10.0  # from drain_s, if the service file sets it, to SIGKILL
EXIT_STOPPED = 130  # the trainer's, after a signal
RESTART_S = 1.0  # before the trainer's first restart; each further one waits twice as long


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """The options of a launch that are not in the configuration."""

    config_path: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False
    accept_teacher: str | None = None
    """With resume: the revision of another teacher than before, or `vaopd.run.teacher.ANY`."""
    restart_trainer: bool = False
    """Restart a trainer from its last checkpoint after every exit that this may cure (`may_be_cured`)."""
    teacher: str | None = None
    """host:port of a running teacher for this run to share; None starts one."""
    service: Path | None = None
    """The service file (`vaopd.config.service`) of the processes that this launch starts."""
    api: bool = True
    gpus: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role → CUDA_VISIBLE_DEVICES; several for "rollout" go to the workers in turn, for "teacher" to replicas."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on the loopback from this port on; 0: on free ones; None: not at all."""


def up(
    options: UpOptions,
    *,
    say: Callable[[str], None] = print,
    show: Callable[[str], None] | None = None,
    check: Callable[[Config], None] = lambda config: None,
) -> int:
    """Runs everything until the trainer exits; returns its exit code, or 128 + n after signal n.

    say: prints a line. show: in a terminal, shows a line that the next one is drawn over. check: raises ConfigError for
    further problems before anything is started. Raises ConfigError for a run that can't start, ChildFailed when a
    process can't be kept alive.
    """
    config = load_config(options.config_path, options.overrides)
    if config.teacher.shared_base and options.teacher is not None:
        raise ConfigError(f"--teacher {options.teacher}: the trainer computes its teacher itself (teacher.shared_base)")
    if config.teacher.shared_base:
        say("teacher: the student's base model, which the trainer computes; no teacher and no scoring API are started")
        options = replace(options, api=False)
    folder = config.run_folder
    if check_start(config, resume=options.resume, accept_teacher=options.accept_teacher, say=say).finished:
        return 0
    if problem := next(find_port_problems(list_addresses(config, options)), None):
        raise ConfigError(problem)
    say(f"run {config.run.name}: checking models and data")
    check(config)
    check_ranks(config, options.service, options.gpus, with_teacher=starts_teacher(config, options))
    if starts_teacher(config, options):
        check_credentials(options.service)
    elif options.teacher is not None:
        _describe_teacher(config, options, options.teacher, say)
    folder.mkdir(parents=True, exist_ok=True)
    with own(folder, UP), StatusWriter(folder, role="vaopd up") as status:
        write_launch(config, teacher=options.teacher, service=options.service, gpus=options.gpus)
        status.write("starting")
        try:
            with Supervisor(logs=folder / "logs", say=say, show=show) as supervisor:
                code = _run_until_ended(_Launch(config, options, supervisor, say), say)
            status.conclude("" if code in (0, EXIT_STOPPED) else f"the trainer {describe_exit(code)}")
        except Interrupted as interrupted:
            status.conclude()
            say(f"{interrupted}; every process has ended. Continue with `vaopd up --resume {shlex.quote(str(folder))}`")
            return interrupted.exit_code
        except VaopdError as error:
            status.conclude(str(error).partition("\n")[0])
            raise
        finally:
            if options.metrics_port is not None:
                locate_targets_file(config).unlink(missing_ok=True)
    if code == 0:
        say(
            f"finished: the model is in {folder / 'model'}; `vaopd report {shlex.quote(str(folder))}` writes its report"
        )
    return code


def starts_teacher(config: Config, options: UpOptions) -> bool:
    """Whether the launch starts a teacher: none runs already, and the trainer computes none itself."""
    return options.teacher is None and not config.teacher.shared_base


def _describe_teacher(config: Config, options: UpOptions, address: str, say: Callable[[str], None]) -> None:
    describe_teacher(config, address, resume=options.resume, accept_teacher=options.accept_teacher, say=say)


def _run_until_ended(launch: _Launch, say: Callable[[str], None]) -> int:
    try:
        return launch.run()
    except Interrupted:
        say("ending: the trainer finishes its step and writes a checkpoint; a second signal ends everything at once")
        raise


class _Launch:
    """Starts the processes of one launch, one after the other."""

    def __init__(self, config: Config, options: UpOptions, supervisor: Supervisor, say: Callable[[str], None]) -> None:
        self._config = config
        self._options = options
        self._supervisor = supervisor
        self._say = say
        self._services = load_service_config(options.service)
        self._overrides = list(options.overrides)
        self._metrics: dict[str, str] = {}  # process -> host:port

    def run(self) -> int:
        if self._config.queue.url == "embedded":
            self._overrides.append(f"queue.url={self._start_redis()}")
        self._start_workers()
        if self._options.teacher is not None:
            self._overrides.append(f"teacher.address={self._options.teacher}")
        elif starts_teacher(self._config, self._options):
            address = self._start_teachers()
            _describe_teacher(self._config, self._options, address, self._say)
            self._overrides.append(f"teacher.address={address}")
        if self._options.api:
            self._start_api()
        return self._run_trainer()

    def _start_redis(self) -> str:
        """Starts a server with its append-only file in the run's folder, so that a resumed run finds its queue."""
        from vaopd.queue.embedded import is_server_ready, make_server_argv, make_server_url

        folder = self._config.run_folder / "queue"
        if not self._options.resume and folder.exists():
            shutil.rmtree(folder)  # left by a launch that ended before its first step
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        argv = make_server_argv(port=port, folder=folder, append_only="everysec")
        child = Child(name="redis", argv=tuple(argv), is_ready=lambda: is_server_ready(port), stop_order=2)
        self._supervisor.start(child)
        self._supervisor.wait_ready("redis", timeout_s=REDIS_TIMEOUT_S)
        return make_server_url(port)

    def _start_workers(self) -> None:
        from vaopd.queue import TrainerQueue

        settings = load_config(self._options.config_path, self._overrides).queue
        url = settings.url if self._config.queue.url == "embedded" else settings.find_url()
        # Only to ask which workers are alive; without patience, since the supervisor asks again anyway.
        queue = TrainerQueue(url=url, job=self._config.run.name, patience_s=0.0)
        devices = self._options.gpus.get("rollout", ())
        for index in range(self._config.rollout.workers):
            name = f"rollout-{index}"

            def is_alive(name: str = name) -> bool:
                try:
                    return name in queue.workers_alive()
                except VaopdError:
                    return False  # Redis itself is being restarted

            visible = devices[index % len(devices)] if devices else None
            child = self._make_service("rollout", name, "--worker", name, devices=visible, is_ready=is_alive)
            self._supervisor.start(child)

    def _start_teachers(self) -> str:
        """Starts a teacher for each value of its devices, all at once; returns their addresses with commas between."""
        devices: Sequence[str | None] = self._options.gpus.get("teacher", (None,))
        names = ["teacher"] if len(devices) == 1 else [f"teacher-{index}" for index in range(len(devices))]
        host = self._config.teacher.address.rpartition(":")[0]
        announced = {}
        for index, (name, visible) in enumerate(zip(names, devices, strict=True)):
            # The first one listens where the configuration says, replicas beside it on free ports.
            settings = ("--set", f"teacher.address={host}:0") if index else ()
            announced[name] = self._announce_file(name)
            arguments = (*settings, "--announce", str(announced[name]))
            self._supervisor.start(
                self._make_service("teacher", name, *arguments, devices=visible, is_ready=announced[name].exists)
            )
        addresses = []
        for name, visible in zip(names, devices, strict=True):
            self._supervisor.wait_ready(name, timeout_s=TEACHER_TIMEOUT_S)
            addresses.append(announced[name].read_text().strip())
            # A restart takes the same port again: trainer and API have no other address.
            arguments = ("--set", f"teacher.address={addresses[-1]}", "--announce", str(announced[name]))
            again = self._make_service("teacher", name, *arguments, devices=visible)
            self._supervisor.set_restart_argv(name, again.argv)
        return ",".join(addresses)

    def _start_api(self) -> None:
        announce = self._announce_file("api")
        arguments: tuple[str, ...] = ("--announce", str(announce), "--runs", str(self._config.run.folder))
        if Path(self._config.student.model).is_dir():  # a click on a page must not download a model
            arguments += ("--student", self._config.student.model)
        self._supervisor.start(self._make_service("api", "api", *arguments, devices="", is_ready=announce.exists))
        self._supervisor.wait_ready("api", timeout_s=API_TIMEOUT_S)
        address = announce.read_text().strip()
        url = f"{'https' if self._services.api.tls.cert else 'http'}://{address}"
        if self._options.metrics_port is not None and not self._api_is_guarded:
            self._list_target("api", address)  # it serves its metrics on its one port
        again = self._make_service("api", "api", "--set", f"api.address={address}", *arguments, devices="")
        self._supervisor.set_restart_argv("api", again.argv)
        name = self._config.run.name
        self._say(f"view the teacher's visual advantage: {url}/ (the API: {url}/docs)")
        folder = shlex.quote(str(self._config.run_folder))
        self._say(f"follow the run: {url}/runs/{name}/report, or `vaopd watch {folder}`")

    def _run_trainer(self) -> int:
        devices = self._options.gpus.get("trainer", (None,))[0]
        first, resume, restarts = True, self._options.resume, 0
        while True:
            arguments: tuple[str, ...] = ("--resume",) if resume else ()
            if self._options.accept_teacher is not None and first:
                arguments += ("--accept-teacher", self._options.accept_teacher)
            child = replace(
                self._make_service("trainer", "trainer", *arguments, devices=devices),
                to_terminal=True,
                stop_order=0,
                grace_s=TRAINER_GRACE_S,
            )
            started = time.monotonic()
            self._supervisor.start(child)
            code = self._supervisor.run_until_exit("trainer")
            if time.monotonic() - started > STEADY_S:
                restarts = 0
            if not (self._options.restart_trainer and may_be_cured(code)) or restarts == child.restarts:
                break
            delay_s = RESTART_S * 2**restarts
            restarts += 1
            first, resume = False, True
            how = describe_exit(code if code >= 0 else 128 - code)
            self._say(f"the trainer {how}; it continues from its last checkpoint in {delay_s:g} s")
            self._supervisor.pause(delay_s, except_for="trainer")
        if code:
            self._say(f"the trainer ended with code {code}; {self._supervisor.log_tail('trainer')}")
        return code if code >= 0 else 128 - code

    def _make_service(
        self,
        role: str,
        name: str,
        *arguments: str,
        devices: str | None,
        is_ready: Callable[[], bool] | None = None,
    ) -> Child:
        settings = getattr(self._services, role, None)  # the trainer has none
        if settings is not None and self._options.service is not None:
            arguments += ("--service", str(self._options.service))
        if role == "teacher" and (ranks := count_ranks(self._config, self._services.teacher, devices)) > 1:
            arguments += ("--set", f"teacher.processes={ranks}")
        grace_s = None
        if settings is not None and "drain_s" in settings.model_fields_set:
            grace_s = settings.drain_s + AFTER_DRAIN_S
        if (role != "api" or self._api_is_guarded) and self._options.metrics_port is not None:
            arguments += ("--metrics-address", self._metrics.get(name) or self._choose_metrics_address(name))
        return Child(
            name=name,
            argv=make_service_argv(role, self._options.config_path, self._overrides, *arguments),
            environment=make_environment(self._config, devices=devices),
            is_ready=is_ready,
            grace_s=grace_s,
        )

    @property
    def _api_is_guarded(self) -> bool:
        """Whether Prometheus could not read metrics on the API's own port."""
        return bool(self._services.api.tls.cert or self._services.api.keys.file)

    def _choose_metrics_address(self, name: str) -> str:
        """Chooses the address of a process that is started for the first time; a restart takes the same again."""
        port = self._options.metrics_port
        address = join_address(LOOPBACK, port + len(self._metrics) if port else free_port())
        self._list_target(name, address)
        self._say(f"metrics of {name}: http://{address}/metrics")
        return address

    def _list_target(self, name: str, address: str) -> None:
        """Adds a process to the list of targets that Prometheus reads by itself (file_sd_configs)."""
        self._metrics[name] = address
        targets = [
            {"targets": [address], "labels": {"role": name.partition("-")[0], "process": name}}
            for name, address in self._metrics.items()
        ]
        write_atomic(locate_targets_file(self._config), json.dumps(targets, indent=1))

    def _announce_file(self, name: str) -> Path:
        path = self._config.run_folder / "logs" / f"{name}.address"
        path.unlink(missing_ok=True)
        return path


def locate_targets_file(config: Config) -> Path:
    """Returns the file in which Prometheus finds a run's processes.

    It is not in the run's folder: file_sd_configs takes patterns in a file's name only, not in its folder's.
    """
    return config.run.folder / f"{config.run.name}.targets.json"


def make_service_argv(role: str, config_path: Path, overrides: Sequence[str], *arguments: str) -> tuple[str, ...]:
    """Returns the command line of one service's process."""
    # Every account of the host can read a command line; `make_environment` passes the password.
    settings = [part for override in overrides for part in ("--set", remove_passwords(override))]
    return (sys.executable, "-m", f"vaopd_{role}", "--config", str(config_path), *settings, *arguments)


def make_environment(config: Config, *, devices: str | None) -> dict[str, str]:
    """Returns the variables that a child gets beside the launcher's own; those that are set there are kept."""
    added = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Two OpenMP threads per process under contention ran up to ten times slower than one; on a GPU host it is the
    # preparation of images that would contend.
    processes = 1 + config.trainer.processes + config.rollout.workers
    added["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    added = {key: value for key, value in added.items() if key not in os.environ}
    added[LAUNCHER] = str(os.getpid())
    if config.queue.own_password is not None:
        added[QUEUE_PASSWORD] = config.queue.own_password
    elif config.queue.url == "embedded":  # it has none
        added |= {QUEUE_PASSWORD: "", QUEUE_PASSWORD_FILE: ""}
    if devices is not None:
        # Numbered as by nvidia-smi. CUDA's own order, the fastest first, is another one where cards differ.
        added |= {"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return added


def list_addresses(config: Config, options: UpOptions) -> dict[str, str]:
    """Returns where the launch's processes will listen, by key."""
    teachers = len(options.gpus.get("teacher", ("",))) if starts_teacher(config, options) else 0
    wanted = {"teacher.address": config.teacher.address} if teachers else {}
    wanted |= {"api.address": config.api.address} if options.api and not config.teacher.shared_base else {}
    if isinstance(config.weights, HttpWeights):
        wanted["weights.address"] = config.weights.address
    if port := options.metrics_port:
        processes = config.rollout.workers + teachers + int(options.api) + 1
        wanted |= {f"--metrics-port {port + index}": join_address(LOOPBACK, port + index) for index in range(processes)}
    return wanted


def may_be_cured(code: int) -> bool:
    """Whether a trainer that exits so may do better after a resume.

    It was killed, failed unexpectedly (a device, a library), or waited in vain for another process. An error by name
    (2) comes back, and a signal's 130 was wanted.
    """
    return code < 0 or code in (1, entry.UNAVAILABLE)


def describe_exit(code: int) -> str:
    """Returns how a process ended, from an exit code or 128 + n for signal n."""
    return f"was killed by {signal.Signals(code - 128).name}" if code > 128 else f"ended with code {code}"
