"""`python -m vaopd.benchmarks_eval.serve_vllm MODEL PORT NAME`: vLLM's server, for this host only, until a signal."""

from __future__ import annotations

import sys

from vaopd.net.ports import LOOPBACK
from vaopd.vlm import vllm_start

if __name__ == "__main__":
    vllm_start.serve(sys.argv[1], host=LOOPBACK, port=int(sys.argv[2]), name=sys.argv[3])
elif __name__ == "__mp_main__":  # in the engine's process, which vLLM spawns: it starts with this module and arguments
    vllm_start.prepare_server_process(sys.argv[1])
