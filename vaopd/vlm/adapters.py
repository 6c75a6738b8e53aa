"""LoRA through PEFT: small matrices that learn beside a student's linear layers, and their merge into its weights.

    y = W·x + alpha / rank · B·(A·x)      A (rank, in), B (out, rank); W stays as it is, and B begins at zero

They travel in PEFT's own form, adapter_config.json and adapter_model.safetensors, which PEFT and vLLM load. Where an
engine can't compute with adapters, `merge_adapters` gives W + alpha / rank · B·A, summed in float32 and rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vaopd.config import LoraConfig
from vaopd.errors import ConfigError, Mismatch
from vaopd.files.hub import is_hub_id
from vaopd.run.snapshots import ADAPTER_CONFIG, ADAPTER_FILE
from vaopd.vlm.model import Vlm
from vaopd.vlm.torchvision_compat import ensure_torchvision

_PREFIX = "base_model.model."
"""PEFT's files name a model's tensors as seen from its own wrapper."""


def add_adapters(
    student: Vlm, lora: LoraConfig, *, vision_tower: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> None:
    """Freezes the student and gives its linear layers adapters, in place.

    vision_tower: whether the tower and what joins it to the text model get some too. dtype: of the adapters.
    seed: of A, the same on all ranks however they hold the student.
    The LM head never gets one: the divergence is computed with its plain weights.

    Raises ConfigError for a name in `lora.target_modules` that no linear layer has.
    """
    ensure_torchvision()
    import peft
    from peft.tuners.lora import LoraLayer

    text = set(student.family.language_model(student.model).modules())
    layers = {
        name
        for name, module in student.model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not student.model.get_output_embeddings()
        and (vision_tower or module in text)
    }
    kinds = {_last(name) for name in layers}
    if strange := set(lora.target_modules) - kinds:
        raise ConfigError(
            f"student.lora.target_modules names {sorted(strange)[0]!r}; the linear layers that may get adapters are "
            f"{', '.join(sorted(kinds))} (student.train_vision_tower = {str(vision_tower).lower()})"
        )
    chosen = sorted(name for name in layers if not lora.target_modules or _last(name) in lora.target_modules)
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=chosen)
    student.model.requires_grad_(False)
    peft.inject_adapter_in_model(settings, student.model)
    generator = torch.Generator().manual_seed(seed)
    for module in student.model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast rounds the matrices, in place of widening each input
            inputs, outputs = module.in_features, module.out_features
            assert inputs is not None
            assert outputs is not None  # None stands for layers that are not linear
            bound = inputs**-0.5  # PEFT's own
            first = torch.empty(lora.rank, inputs).uniform_(-bound, bound, generator=generator)
            _set(module.lora_A, first.to(dtype))
            _set(module.lora_B, torch.zeros(outputs, lora.rank, dtype=dtype))


def _set(side: nn.ModuleDict, values: Tensor) -> None:
    """Gives a layer's A or B values, where the layer is; on the CPU for a layer on "meta", which has no memory."""
    layer: Any = side["default"]
    device = layer.weight.device
    layer.weight = nn.Parameter(values.to("cpu" if device.type == "meta" else device))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Lets a model compute as the one that its adapters were added to. No other thread may use it meanwhile."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # and lets them learn again


def describe_adapters(model: nn.Module, *, base: str) -> dict[str, Any]:
    """Returns adapter_config.json's table of a model with adapters; base: the hub id or folder of its other weights."""
    settings: dict[str, Any] = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    return settings | {
        "target_modules": sorted(settings["target_modules"]),
        "base_model_name_or_path": base if is_hub_id(base) else Path(base).name,
        "inference_mode": True,
    }


def name_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapters among a model's tensors, under PEFT's names; none for a model without."""
    return {_PREFIX + name.replace(".default.", "."): tensor for name, tensor in state.items() if _is_adapter(name)}


def name_base(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the other tensors, under the names that they have in a model without adapters."""
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if not _is_adapter(name)}


def read_adapters(folder: Path, *, alpha: int) -> dict[str, Tensor]:
    """Returns the adapters in a folder of PEFT's form, for `load_adapters`.

    Raises ConfigError for a folder without them, or with another alpha, which their names and shapes don't tell.
    """
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text())["lora_alpha"]
        adapters = load_file(folder / ADAPTER_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"student.lora.start = {folder} can't be read as PEFT's adapters: {error}") from None
    if found != alpha:
        raise ConfigError(f"student.lora.start = {folder} has alpha {found}, not student.lora.alpha = {alpha}")
    return adapters


def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads tensors from `name_adapters` into a model that has adapters. Raises Mismatch for another set of layers."""
    own = name_adapters(model.state_dict())
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        differing = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
        raise Mismatch(
            f"the adapters differ from the model's in {len(differing)} tensors, e.g. {differing[0]}; they belong to "
            "another model, rank or choice of layers"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def merge_adapters(base: Path, adapter: Path, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the base model's tensors with the adapters of folder `adapter` added, on the CPU, rounded to `dtype`.

    Raises Mismatch for adapters of another model.
    """
    ensure_torchvision()
    from transformers import AutoModelForImageTextToText

    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    scale = settings["lora_alpha"] / settings["r"]
    adapters = load_file(adapter / ADAPTER_FILE)
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    merged = {}
    for name, tensor in model.state_dict().items():
        layer = _PREFIX + name.removesuffix(".weight")
        a, b = (adapters.pop(f"{layer}.lora_{side}.weight", None) for side in "AB")
        if a is not None and b is not None:
            tensor = tensor.float() + scale * (b.float() @ a.float())
        merged[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if adapters:
        raise Mismatch(f"{adapter} has adapters for {min(adapters)}, a layer that {base} doesn't have")
    return merged


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _last(name: str) -> str:
    return name.rpartition(".")[2]
