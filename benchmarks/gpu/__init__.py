"""Checks this project on one GPU against the figures that the arithmetic allows: `python -m benchmarks.gpu`."""

import sys
from pathlib import Path

# The other benchmarks are scripts, which import each other by plain names.
sys.path.insert(0, str(Path(__file__).parents[1]))
