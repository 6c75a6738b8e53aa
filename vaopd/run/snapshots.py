"""Writes and checks policy snapshots: the student's weights as folders that transformers and vLLM can load.

run/policy/v000042/model.safetensors     (written beside, then renamed: a reader sees all of it or nothing)
                   model-00001-of-00017.safetensors, …, model.safetensors.index.json    (of a large model)
run/policy/v000042/config.json, …        (tokenizer, processor, chat template: the student's own)

With LoRA adapter_model.safetensors and adapter_config.json alone, as PEFT writes them: what the student's own folder
lacks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vaopd.errors import InvalidInput, Mismatch, NotFound
from vaopd.files.durable import atomic_folder, copy_file
from vaopd.run.tensor_files import TensorStream, compute_digest, write_tensors
from vaopd.types import PolicyVersion

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
HEAD = "lm_head.weight"
FILE_BYTES = 256 * 2**20
"""Of one file of weights: enough files that several are written at once."""
# All files of a model folder but its weights, and the index of weights in several files.
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
VERSION_FOLDER = re.compile(r"v(\d{6,})")


def publish_snapshot(
    folder: Path, version: int, state: Mapping[str, torch.Tensor] | TensorStream, *, model_files_from: Path
) -> PolicyVersion:
    """Writes `folder`/policy/v{version}; replaces an existing one in one step.

    state: the model's whole `state_dict()`, on any device, under the names that `save_pretrained` writes; a tied LM
    head is left out, as there. A stream is written as it is, tensor by tensor. model_files_from: the student's folder,
    for configuration and tokenizer.
    """
    if version < 0:
        raise InvalidInput(f"policy version is {version}; it must be 0 or more")
    path = locate_snapshot(folder, version)
    with atomic_folder(path, wait_for_disk=False) as aside:
        digest = write_model(aside, state, model_files_from=model_files_from)
    return PolicyVersion(version=version, path=str(path), sha256=digest)


def write_model(folder: Path, state: Mapping[str, torch.Tensor] | TensorStream, *, model_files_from: Path) -> str:
    """Writes a model into an existing folder, see `publish_snapshot`; returns the digest of its weights."""
    if isinstance(state, TensorStream):
        stream = state
    else:
        stream = TensorStream(drop_tied_head(state, tied=has_tied_head(model_files_from)))
    digest = write_tensors(stream, folder / WEIGHTS_FILE, file_bytes=FILE_BYTES)
    for source in list_model_files(model_files_from):
        copy_file(source, folder / source.name)
    _name_dtype(folder / "config.json", stream.shapes.values())
    return digest


def publish_adapter(
    folder: Path, version: int, adapters: Mapping[str, torch.Tensor] | TensorStream, *, settings: Mapping[str, Any]
) -> PolicyVersion:
    """Writes adapters, under PEFT's names, as `folder`/policy/v{version}; settings: adapter_config.json's table."""
    path = locate_snapshot(folder, version)
    with atomic_folder(path, wait_for_disk=False) as aside:
        digest = write_tensors(adapters, aside / ADAPTER_FILE)
        (aside / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return PolicyVersion(version=version, path=str(path), sha256=digest)


def is_adapter(folder: Path | str) -> bool:
    """Whether a snapshot holds adapters only, without the base model's weights."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def describe_model(model: Path) -> PolicyVersion:
    """Returns a model folder as policy version 0. Raises NotFound for one without safetensors files."""
    if not (files := list_weights(model)):
        raise NotFound(f"{model} holds no safetensors files; save the model with `save_pretrained`")
    return PolicyVersion(version=0, path=str(model), sha256=compute_digest(*files))


def list_weights(folder: Path) -> list[Path]:
    """Lists a snapshot's files of weights, a model's or an adapter's, in the order of their digest."""
    return sorted(folder.glob("*.safetensors"))


def keep_snapshot(policy: PolicyVersion, target: Path) -> None:
    """Keeps a snapshot as `target`, a model folder of its own that pruning doesn't touch; replaces an existing one."""
    with atomic_folder(target) as aside:
        for source in Path(policy.path).iterdir():
            copy_file(source, aside / source.name)


def locate_snapshot(folder: Path, version: int) -> Path:
    """Returns the snapshot's place in the run's folder."""
    return folder / "policy" / f"v{version:06d}"


def list_model_files(folder: Path) -> list[Path]:
    """Lists configuration, tokenizer, processor and chat template of a model folder: all but its weights."""
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder} is not a model folder: it has no config.json")
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".index.json"))


def prune_snapshots(folder: Path, keep: int, *, current: int | None = None) -> list[int]:
    """Removes all snapshots but the newest `keep`, and half-written ones; returns the versions removed.

    current: higher versions are left from a run that was then resumed at an earlier step; they are removed too and
    don't count.
    """
    if keep < 1:
        raise InvalidInput(f"keep is {keep}; keep at least 1 snapshot, the one that the workers sample from")
    policies = folder / "policy"
    versions = sorted(int(match[1]) for path in policies.glob("v*") if (match := VERSION_FOLDER.fullmatch(path.name)))
    valid = [version for version in versions if current is None or version <= current]
    removed = [version for version in versions if version not in valid[-keep:]]
    for version in removed:
        # Renamed first, so that no worker begins to read a folder that is half removed.
        doomed = policies / f".v{version:06d}.tmp-pruned"
        locate_snapshot(folder, version).rename(doomed)
    newest = locate_snapshot(folder, max(valid, default=0)).name
    for leftover in policies.glob(".v*.tmp-*"):
        if leftover.name != f".{newest}.tmp-deltas":  # announced before: workers fetch them already
            # A worker's late question may write a delta to it at this moment; then the next pruning removes it.
            shutil.rmtree(leftover, ignore_errors=True)
    return removed


def verify_snapshot(policy: PolicyVersion) -> None:
    """Raises NotFound when the snapshot is missing, Mismatch when its weights are not those that were announced."""
    try:
        if not (files := list_weights(Path(policy.path))):
            raise FileNotFoundError
        digest = compute_digest(*files)
    except FileNotFoundError:
        raise NotFound(
            f"policy version {policy.version}: no weights in {policy.path}; it was pruned (take the latest version), "
            "or the trainer's folder is not mounted here under the same path"
        ) from None
    if digest != policy.sha256:
        raise Mismatch(
            f"policy version {policy.version}: the weights in {policy.path} have digest {digest[:12]}…, not "
            f"{policy.sha256[:12]}…; they were replaced or damaged: take the latest version"
        )


def has_tied_head(model_folder: Path) -> bool:
    """Whether the model's LM head is its embedding matrix, by config.json."""
    config = json.loads((model_folder / "config.json").read_text()) if (model_folder / "config.json").is_file() else {}
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def drop_tied_head(state: Mapping[str, torch.Tensor], *, tied: bool) -> dict[str, torch.Tensor]:
    """Returns the tensors that `save_pretrained` would write: no tied LM head, all contiguous.

    `tied` comes from the configuration, not from the storage: a state that is gathered from shards holds the tied
    tensor twice.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items() if not (tied and name == HEAD)}
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        owner = owners.setdefault((tensor.device, tensor.data_ptr()), name)
        if owner != name:
            raise InvalidInput(
                f"{name} and {owner} share storage, though config.json does not tie them (tie_word_embeddings); "
                "clone one, or correct config.json"
            )
    return tensors


def _name_dtype(config_file: Path, tensors: Iterable[torch.Tensor]) -> None:
    """Writes the weights' precision into config.json, so that `dtype="auto"` loads them as they are.

    The student's own config.json may name the precision that it was read in, not the one that it was trained in.
    """
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    if not sizes:
        return
    dtype = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    config = json.loads(config_file.read_text())
    written = _with_dtype(config, dtype) | {"dtype": dtype}
    if written != config:
        config_file.write_text(json.dumps(written, indent=2) + "\n")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a configuration in which every precision that is named, also of its parts, is `dtype`."""
    found = {}
    for key, value in config.items():
        named = key in ("dtype", "torch_dtype")
        found[key] = dtype if named else _with_dtype(value, dtype) if isinstance(value, dict) else value
    return found
