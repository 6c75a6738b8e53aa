"""The Triton kernels of layers and log-probs, in Triton's interpreter on a CPU, against float64 formulas."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.families import family_vlm
from tests.support.tolerance import assert_noticed, assert_within, gamma

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed"),
]
ROOT = Path(__file__).parents[2]
TOKENS, HEADS, DIM = 5, 3, 12  # neither heads nor half a head is a power of two
VOCABULARIES = {"one_block": (300, 320), "several_blocks": (9001, 9024), "whole_blocks": (8192, 8192)}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(name: str) -> Tensor:
    """Some nats, one row far from zero, one of almost nothing but −∞, and garbage beyond the vocabulary."""
    vocabulary, width = VOCABULARIES[name]
    rows = 4 * draw(vocabulary, 4, width)
    rows[1] += 80
    rows[2, 1:] = -torch.inf
    rows[:, vocabulary:] = torch.nan
    return rows


INPUTS = {
    "rows": draw(1, TOKENS, HEADS, DIM),
    "of_three": draw(2, TOKENS, 3, HEADS, DIM),
    "cos": draw(3, TOKENS, DIM),
    "sin": draw(4, TOKENS, DIM),
    "weight": draw(5, DIM),
    "gate": 3 * draw(6, 7, 300),
    "up": draw(7, 7, 300),
    **{f"logits.{name}": logits(name) for name in VOCABULARIES},
    **{f"vocabulary.{name}": torch.tensor(vocabulary) for name, (vocabulary, _) in VOCABULARIES.items()},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("kernels")
    save_file(INPUTS, folder / "inputs.safetensors")
    command = [sys.executable, "-m", "tests.support.layer_kernel_runs", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    return load_file(folder / "outputs.safetensors")


def rotated(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation in float64, and the sum of its terms' magnitudes."""
    rows, cos, sin = rows.double(), INPUTS["cos"].double()[:, None], INPUTS["sin"].double()[:, None]
    first, second = rows.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return rows * cos + turned * sin, (rows * cos).abs() + (turned * sin).abs()


def test_rotary_positions_turn_the_halves_of_each_head(found: dict[str, Tensor]) -> None:
    for name, rows in (("rotated", INPUTS["rows"]), ("of_a_part", INPUTS["of_three"][:, 1])):
        expected, magnitudes = rotated(rows)
        assert_within(found[name], expected, gamma(3) * magnitudes, name)
        assert_noticed(rows.double(), expected, gamma(3) * magnitudes)


def test_a_norm_comes_before_the_rotation(found: dict[str, Tensor]) -> None:
    rows = INPUTS["rows"].double()
    normed = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * INPUTS["weight"].double()
    expected, magnitudes = rotated(normed)
    error = gamma(DIM + 10) * magnitudes
    assert_within(found["normed"], expected, error)
    assert_noticed(rotated(rows)[0], expected, error)


def test_swiglu_is_the_formula(found: dict[str, Tensor]) -> None:
    gate, up = INPUTS["gate"].double(), INPUTS["up"].double()
    expected = gate * gate.sigmoid() * up
    error = gamma(6, exps=1) * expected.abs()
    assert_within(found["product"], expected, error)
    assert_noticed(gate * up, expected, error)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_log_sums_are_those_of_the_logical_vocabulary(found: dict[str, Tensor], name: str) -> None:
    vocabulary = VOCABULARIES[name][0]
    rows = INPUTS[f"logits.{name}"][:, :vocabulary].double()
    expected = rows.logsumexp(-1)
    finite = rows.masked_fill(rows.isinf(), 0.0)
    error = gamma(vocabulary, exps=2) + gamma(3) * finite.abs().amax(-1)
    assert_within(found[f"log_sum.{name}"], expected, error)
    # One id more in the sum, as likely as the likeliest.
    assert_noticed(torch.cat([rows, rows.amax(-1, keepdim=True)], -1).logsumexp(-1), expected, error)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_whole_forward_with_the_kernels_is_that_without(found: dict[str, Tensor], family: str) -> None:
    """Both in float32: the sums differ in their order only."""
    plain, fused = found[f"{family}.plain"], found[f"{family}.fused"]
    config = family_vlm(family).config
    layers = config.vision_config.depth + (config.text_config.num_hidden_layers if family == "qwen3_vl" else 0)
    assert found[f"{family}.calls"] == 2 * layers  # queries and keys, in the second run only
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


class Launches:
    """Stands for the kernels: notes for each launch the tensor whose device is the current one, None outside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Tensor | None] = []
        self.current: Tensor | None = None
        monkeypatch.setattr(torch.cuda, "device_of", self.device_of)

    @contextmanager
    def device_of(self, tensor: Tensor) -> Iterator[None]:
        self.current = tensor
        yield
        self.current = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.found.append(self.current)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the thread's current device, which a model over several devices, or another thread, doesn't have."""
    from vaopd.divergence import kernels as of_rows
    from vaopd.vlm import kernels

    launches = Launches(monkeypatch)
    for module, name in ((kernels, "_rotate"), (kernels, "_multiply_by_silu")):
        monkeypatch.setattr(module, name, launches)
    for name in ("_normalise", "_differentiate", "_sum"):
        monkeypatch.setattr(of_rows, name, launches)
    rows, row = torch.empty(5, 3, 12, device="meta"), torch.empty(5, 12, device="meta")
    kernels.rotate(rows, row, row)
    kernels.multiply_by_silu(row, row)
    of_rows.compare_logits(row, row, slope=row)
    of_rows.compute_log_sums(row)
    assert [tensor is not None and tensor.is_meta for tensor in launches.found] == [True] * 5


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_rotate", {"D": 128, "HALF": 64, "HEADS": 32, "NORMED": True}),
        ("_rotate", {"D": 72, "HALF": 64, "HEADS": 16, "NORMED": False}),
        ("_multiply_by_silu", {"BLOCK": 1024}),
        ("_sum", {"BLOCK": 4096}),
    ],
)
def test_the_kernels_compile_for_an_h100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, constants: dict[str, Any]
) -> None:
    """To sm_90 machine code, which takes no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vaopd.divergence import kernels as of_rows
    from vaopd.vlm import kernels

    function = getattr(kernels, name, None) or getattr(of_rows, name)
    types = dict.fromkeys(("values", "weight", "out", "gate", "up"), "*bf16") | {"logits": "*fp32", "epsilon": "fp32"}
    types |= {"cos": "*bf16", "sin": "*bf16"} | ({"out": "*fp32"} if name == "_sum" else {})
    signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert "st.global" in compiled.asm["ptx"]
