"""`python -m vaopd.tiny NAME FOLDER`: pre-train one tiny model; about ten minutes on one core."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vaopd.tiny.config import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vaopd.tiny", description="Pre-train one tiny Qwen3-VL.")
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, help="instead of the recipe's own")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own")
    arguments = parser.parse_args()

    from vaopd.tiny.pretrain import make

    print(json.dumps(make(arguments.name, arguments.folder, seed=arguments.seed, steps=arguments.steps), indent=2))


if __name__ == "__main__":
    main()
