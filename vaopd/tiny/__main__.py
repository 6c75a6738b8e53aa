"""`python -m vaopd.tiny NAME FOLDER`: pre-trains a tiny model in about ten minutes on one core."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vaopd.tiny.config import MODELS


def main() -> None:
    """Pre-trains a model and prints its training.json."""
    parser = argparse.ArgumentParser(prog="python -m vaopd.tiny", description="Pre-train one tiny Qwen3-VL.")
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, help="default: the recipe's")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    arguments = parser.parse_args()

    from vaopd.tiny.pretrain import make

    print(json.dumps(make(arguments.name, arguments.folder, seed=arguments.seed, steps=arguments.steps), indent=2))


if __name__ == "__main__":
    main()
