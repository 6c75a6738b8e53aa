"""`python -m vaopd.benchmarks_eval.serve_vllm MODEL --port N --name NAME`: vLLM's server on this host only."""

from __future__ import annotations

import argparse

from vaopd.net.ports import LOOPBACK
from vaopd.vlm import vllm_start


def main() -> None:
    """Serves a model until a signal ends the process."""
    parser = argparse.ArgumentParser(prog="serve_vllm")
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    vllm_start.serve(arguments.model, host=LOOPBACK, port=arguments.port, name=arguments.name)


if __name__ == "__main__":
    main()
