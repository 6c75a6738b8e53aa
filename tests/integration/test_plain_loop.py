"""The example of another trainer: a plain PyTorch loop against a running teacher."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import tolerance
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import teacher_in_process
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.data import handwritten_geometry
from vaopd.data.loaders import load_prompts
from vaopd.vlm.model import Segment, Vlm

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_pytorch_loop.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("plain_pytorch_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "geometry"
    handwritten_geometry.write(folder, seed=0, train=8, validation=1, test=1)
    return folder


def test_it_trains(
    example: Any, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with teacher_in_process(tiny_vlm("teacher")) as teacher:
        arguments = {"--teacher": teacher.target, "--student": str(model_folder("student")), "--data": str(data)}
        arguments |= {"--steps": "2", "--prompts": "2", "--rollouts": "2"}
        words = [word for pair in arguments.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["plain_pytorch_loop.py", *words])
        example.main()
    losses = re.findall(r"step \d/2  loss ([\d.]+)  mean VA [\d.]+", capsys.readouterr().out)
    assert len(losses) == 2
    assert all(float(loss) > 0 for loss in losses)


@pytest.mark.numeric
def test_its_hidden_states_are_those_of_the_trainer(example: Any, data: Path) -> None:
    """One plain forward per sequence there; here the prompt once for all siblings."""
    student = Vlm.load(model_folder("student"), dtype="float64")
    prompt = load_prompts(data, split="train")[0]
    inputs = example.prepare_inputs(prompt, student.processor)
    responses = [torch.tensor([40, 41, 42]), torch.tensor([50, 51])]
    prepared = {image.sha256: student.prepare_image(example.decode(image)) for image in prompt.images}
    rendered = student.render(prompt.messages, prepared)
    np.testing.assert_array_equal(rendered.token_ids, inputs["input_ids"][0].numpy())
    with torch.no_grad():
        found = example.compute_hidden(student.model, inputs, responses)
        expected = student.compute_response_hidden(
            [Segment(prompt=rendered, responses=tuple(response.numpy() for response in responses))]
        )
    relative = tolerance.forward(student.config, dtype=torch.float64)
    assert_within((found - expected).norm(dim=-1), 0.0, relative * expected.norm(dim=-1))
    assert_noticed((expected.roll(1, 0) - expected).norm(dim=-1), 0.0, relative * expected.norm(dim=-1))
