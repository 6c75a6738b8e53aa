"""Explains errors of torch, vLLM and the import system, with the remedy."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from vaopd.errors import ConfigError, Unavailable, VaopdError
from vaopd.files.plain import UnfitFile
from vaopd.process.extras import explain_missing_module

NO_VLLM = (
    "vLLM is not installed; pip install '.[gpu]' (without a GPU: '.[cpu]'), or do without it: "
    "--set rollout.engine=transformers"
)
NO_BITSANDBYTES = "trainer.optimizer = \"adamw_8bit\" needs bitsandbytes; pip install 'vaopd[adamw-8bit]'"
LESS_MEMORY = {
    "trainer": "lower data.max_pixels, trainer.chunk_tokens or rollout.max_new_tokens, or give it a device of its own",
    "teacher": "spread it over more devices (--gpus teacher=0,1), or lower teacher.batch_tokens or data.max_pixels",
    "api": "do without --student, or give it a device of its own",
    "rollout": "lower gpu_memory_utilization or max_model_len in rollout.engine_options, or rollout.tokens_in_flight",
}


_DISK = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that this account may write",
    errno.EPERM: "choose a folder that this account may write",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or choose another disk",
    errno.EIO: "the disk is damaged; choose another one",
    errno.ELOOP: "remove that loop of links",
}
_PATH = {
    errno.EISDIR: "name a file in it, or move that folder away",
    errno.ENOTDIR: "a part of this path is a file; choose another one, or move that file away",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_LOST_RANK = re.compile(r"gloo/transport|ncclRemoteError")
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def explain_disk(error: BaseException) -> str | None:
    """Returns one line for a file that can't be written or read, as the disk or its rights are; None for the rest."""
    code = getattr(error, "errno", None)
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a rename, where it should go
    if type(error).__name__ == "SafetensorError" and (found := _RUST_ERRNO.search(str(error))):
        code = int(found[1])
    place = f"{os.fspath(path)}: " if isinstance(path, str | os.PathLike) else ""
    if isinstance(error, UnfitFile):
        return f"{place}{error.strerror}; move it away, and copy the file back from a backup if it matters"
    if code == errno.ENOENT and isinstance(path, str | os.PathLike) and not Path(path).parent.exists():
        return f"{place}its folder doesn't exist, or was removed meanwhile; make it, or name another one"
    if code not in _DISK and code not in _PATH:
        return None
    remedy = _PATH.get(code) or f"{_DISK[code]}, then continue with --resume or run the command again"
    return f"{place}{os.strerror(code)}; {remedy}"


def explain(error: BaseException, role: str) -> str | None:
    """Returns what an error of torch, vLLM or the import system means for a process of `role`; None if unknown."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text.splitlines()[0]}); {LESS_MEMORY[role]}. docs/real_models.md computes what fits"
    if "not compiled with CUDA" in text or "No CUDA GPUs are available" in text or "no NVIDIA driver" in text:
        return f"no GPU can be used ({text.splitlines()[0]}); `vaopd doctor` shows what torch sees"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "vllm":
        return NO_VLLM
    if isinstance(error, ImportError) and (missing := explain_missing_module(error, role)):
        return missing
    if (disk := explain_disk(error)) is not None:
        return disk
    if "Engine core initialization failed" in text:
        return f"vLLM did not start; its own lines above say why. Most often it is memory: {LESS_MEMORY['rollout']}"
    return None


def is_lost_rank(error: Exception) -> bool:
    """Whether an error of a collective means that another rank, or its host, has gone."""
    return _LOST_RANK.search(str(error)) is not None


def as_config_error(error: Exception, role: str) -> VaopdError:
    """Returns the error with its explanation; re-raises one without, so that its traceback stays."""
    if is_lost_rank(error):
        return Unavailable(f"another rank has ended, and its own lines say why ({str(error).splitlines()[0][:200]})")
    explanation = explain(error, role)
    if explanation is None:
        raise error
    return ConfigError(explanation)
