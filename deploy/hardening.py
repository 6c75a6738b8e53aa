"""Checks running containers against SECURITY.md's baseline, from inside and by the engine's `inspect`.

    python3 deploy/hardening.py [--engine docker|podman] [--project vaopd]

Each container of the project: an account that is not root, no capabilities, no new privileges, a root file system that
can't be written; ports published on the loopback only; Redis on internal networks only. Prints a line per container;
exit status 1 if one of them differs. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

NO_CAPABILITIES = "0000000000000000"
# One shell command, of programs that every image has.
INSIDE = "cat /proc/self/status; touch /vaopd-was-here 2>/dev/null && echo writable: yes || echo writable: no"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", default="docker", choices=("docker", "podman"))
    parser.add_argument("--project", default="vaopd", help="the compose project's name")
    arguments = parser.parse_args()
    engine, project = arguments.engine, arguments.project
    names = run(engine, "ps", "--filter", f"label=com.docker.compose.project={project}", "--format", "{{.Names}}")
    if not names.split():
        print(f"no running container of project {project!r}; start it first", file=sys.stderr)
        return 2
    internal = {
        network["Name" if "Name" in network else "name"]
        for network in json.loads(run(engine, "network", "inspect", *run(engine, "network", "ls", "-q").split()))
        if network.get("Internal", network.get("internal"))
    }
    differs = 0
    for name in sorted(names.split()):
        [container] = json.loads(run(engine, "inspect", name))
        problems = [*check_inside(run(engine, "exec", name, "sh", "-c", INSIDE)), *check_outside(container, internal)]
        differs += bool(problems)
        print(f"{name}: {'; '.join(problems) or 'passes'}")
    return 1 if differs else 0


def check_inside(output: str) -> list[str]:
    """Returns the problems in the output of INSIDE."""
    status = {key: value.split() for key, _, value in (line.partition(":") for line in output.splitlines())}
    problems = []
    if "0" in status["Uid"]:
        problems.append("runs as root")
    if held := [kind for kind in ("CapPrm", "CapEff", "CapBnd") if status[kind] != [NO_CAPABILITIES]]:
        problems.append("has capabilities: " + ", ".join(f"{kind} {status[kind][0]}" for kind in held))
    if status["NoNewPrivs"] != ["1"]:
        problems.append("may gain privileges")
    if status["writable"] != ["no"]:
        problems.append("its root file system can be written")
    return problems


def check_outside(container: dict[str, Any], internal: set[str]) -> list[str]:
    """Returns the problems of a container's `inspect`; `internal`: the names of internal networks."""
    settings = container["NetworkSettings"]
    published = [binding for bindings in (settings["Ports"] or {}).values() for binding in bindings or ()]
    problems = [
        f"port {binding['HostPort']} is published on {binding['HostIp'] or 'all addresses'}"
        for binding in published
        if binding["HostIp"] not in ("127.0.0.1", "::1")
    ]
    labels = container["Config"]["Labels"]
    if labels["com.docker.compose.service"] == "redis":
        problems += [f"is on network {name}, which is not internal" for name in set(settings["Networks"]) - internal]
        problems += [f"publishes port {binding['HostPort']}" for binding in published]
    return problems


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
