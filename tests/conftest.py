"""Fixtures that every test may use."""

from __future__ import annotations

import os

# Each process gets one core: two OpenMP threads per process under contention ran up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
