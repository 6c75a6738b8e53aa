"""Measures how long a step's weights take from the trainer to a worker: bytes and seconds, whole and as a delta.

    python benchmarks/weights_transfer.py                          # both processes on this host
    sudo python benchmarks/weights_transfer.py --rate 10gbit       # in two network namespaces, over a link of that rate

Random bf16 weights are trained by AdamW at the recipe's learning rate, on gradients that are half constant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vaopd.run.snapshots import publish_snapshot
from vaopd.types import PolicyVersion
from vaopd.weights.fetch import PolicyFetcher
from vaopd.weights.serve import SnapshotServer

TRAINER, WORKER = "10.77.0.1", "10.77.0.2"


def serve(options: argparse.Namespace, folder: Path) -> None:
    """The trainer: publishes a version for each line of standard input, and prints its path and digest."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(options.millions * 10**6) * 0.02)
    optimizer = torch.optim.AdamW([weights], lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    constant, last = torch.randn_like(weights), weights.detach().bfloat16()
    server = SnapshotServer(f"{options.host}:0")
    (folder / "student").mkdir()
    (folder / "student/config.json").write_text("{}")
    for version, _ in enumerate(sys.stdin):
        new = weights.detach().bfloat16()
        changed = (new.view(torch.int16) != last.view(torch.int16)).float().mean().item()
        started = time.perf_counter()
        layers = {f"layer.{n}": part for n, part in enumerate(new.chunk(32))}
        policy = publish_snapshot(folder, version, layers, model_files_from=folder / "student")
        seconds = time.perf_counter() - started
        print(json.dumps([version, server.offer(policy).path, policy.sha256, changed, seconds]), flush=True)
        last = new
        weights.grad = (constant + torch.randn_like(weights)) / 2
        optimizer.step()
    server.close()


def measure(options: argparse.Namespace, folder: Path) -> None:
    """The worker: asks for a version, fetches it, and prints a line."""
    prefix = ["ip", "netns", "exec", "vaopd-trainer"] if options.rate else []
    command = [*prefix, sys.executable, __file__, "--serve", str(folder), "--host", options.host]
    command += ["--millions", str(options.millions), "--learning-rate", str(options.learning_rate)]
    (folder / "worker").mkdir()
    fetcher = PolicyFetcher(folder / "worker")
    print("version  weights changed   published in    bytes of all      fetched in")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        for _ in range(options.versions):
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            version, path, digest, changed, published_s = json.loads(trainer.stdout.readline())
            before, started = fetcher.fetched_bytes, time.perf_counter()
            fetcher.fetch(PolicyVersion(version=version, path=path, sha256=digest))
            seconds, share = time.perf_counter() - started, (fetcher.fetched_bytes - before) / (2e6 * options.millions)
            print(f"{version:7} {changed:16.2%} {published_s:12.2f} s {share:15.2%} {seconds:13.2f} s", flush=True)
        trainer.stdin.close()
    fetcher.close()


@contextlib.contextmanager
def link(rate: str) -> Iterator[None]:
    """Joins two network namespaces, vaopd-trainer and vaopd-worker, by a link of that rate in each direction."""
    run = lambda line: subprocess.run(["ip", *line.split()], check=True)  # noqa: E731
    try:
        run("netns add vaopd-trainer")
        run("netns add vaopd-worker")
        run("link add vaopd-t netns vaopd-trainer type veth peer name vaopd-w netns vaopd-worker")
        for name, device, address in (("trainer", "vaopd-t", TRAINER), ("worker", "vaopd-w", WORKER)):
            run(f"-n vaopd-{name} addr add {address}/24 dev {device}")
            run(f"-n vaopd-{name} link set {device} up")
            run(f"netns exec vaopd-{name} tc qdisc add dev {device} root tbf rate {rate} burst 4mb latency 50ms")
        yield
    finally:
        for name in ("trainer", "worker"):
            subprocess.run(["ip", "netns", "delete", f"vaopd-{name}"], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=int, default=200, help="weights, 2 bytes each")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="where snapshots are written and fetched to"
    )
    parser.add_argument("--rate", help="of the link between two network namespaces, e.g. 10gbit; needs root")
    parser.add_argument("--host", default="127.0.0.1", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options, options.serve)
    elif options.rate and options.host != TRAINER:
        with link(options.rate):
            inside = ["ip", "netns", "exec", "vaopd-worker", sys.executable, *sys.argv, "--host", TRAINER]
            subprocess.run(inside, check=True)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            measure(options, Path(scratch))


if __name__ == "__main__":
    main()
