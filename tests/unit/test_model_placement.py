"""A model whose weights are not all on a device is refused when it is loaded."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import model_folder
from vaopd.errors import ConfigError
from vaopd.vlm.model import Vlm
from vaopd.vlm.placement import check_placement

GIB = 2**30


def test_a_weight_that_found_no_room_is_refused_with_what_is_needed_and_there() -> None:
    """A table of 2³⁰ bfloat16 numbers, 2 GiB, is on `meta`; beside it a small one."""
    model = torch.nn.Module()
    model.small = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    model.large = torch.nn.Linear(2**15, 2**15, bias=False, dtype=torch.bfloat16, device="meta")
    with pytest.raises(
        ConfigError,
        match=r"teacher-32b needs 2\.0 GiB for its weights in bfloat16, and 2\.0 GiB of them found no room; "
        r"this process sees 1\.5 \+ 0\.5 GiB\. Give it more devices",
    ):
        check_placement(model, "teacher-32b", devices_bytes=[GIB * 3 // 2, GIB // 2])
    del model.large
    check_placement(model, "teacher-32b", devices_bytes=[])


def test_a_head_that_accelerate_put_on_disk_is_refused_at_load() -> None:
    """As `device_map = "auto"` does by itself where the devices and the host are too small."""
    everywhere_else = {"model.visual": "cpu", "model.language_model": "cpu"}
    with pytest.raises(ConfigError, match=r"GiB of them found no room; this process sees"):
        Vlm.load(model_folder("teacher"), device_map=everywhere_else | {"lm_head": "disk"})
    Vlm.load(model_folder("teacher"), device_map=everywhere_else | {"lm_head": "cpu"})
