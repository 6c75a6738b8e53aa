"""What a server sets for its own process: open files for its connections, one arena for its memory."""

from __future__ import annotations

import resource
import subprocess
import sys

from vaopd.net.ports import OWN_FILES, allow_connections

ARENAS = """
import ctypes, sys, threading
from vaopd.process.memory import give_back, use_one_arena
if sys.argv[1] == "one":
    use_one_arena()
threads = [threading.Thread(target=lambda: [bytes(4096) for _ in range(100)]) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


def test_a_server_may_open_as_many_files_as_it_takes_connections() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_connections(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100 + OWN_FILES, before[1])
        allow_connections(50)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100 + OWN_FILES, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_threads_share_one_arena() -> None:
    """Counted by glibc's own report; what one thread frees, another one then uses."""
    counts = {}
    for mode in ("one", "many"):
        done = subprocess.run([sys.executable, "-c", ARENAS, mode], capture_output=True, text=True, check=True)
        counts[mode] = done.stdout.count("<heap nr=")
    assert counts["one"] == 1 < counts["many"]
