"""The example in TRL: its trainer learns from a running teacher, and its loss is the method's. Skipped without TRL."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import divergences, tolerance
from tests.support.models import model_folder
from tests.support.teacher import TeacherInProcess
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.data import handwritten_geometry

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("trl_trainer")


def test_it_trains_and_its_loss_is_the_method_s(
    example: Any, teacher: TeacherInProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition in float64: KL from both sides' whole distributions, weighted, over B groups."""
    batches: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]] = []
    configs: list[Any] = []
    compute = example.VisualAdvantageTrainer._compute_loss

    def remembered(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = compute(self, model, inputs)
        if not batches:  # before the first step
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            seen = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, **seen).logits
            batches.append((inputs, logits, loss.detach()))
            configs.append(model.config)
            batches.append((inputs, self._teacher_head, loss.detach()))
        return loss

    monkeypatch.setattr(example.VisualAdvantageTrainer, "_compute_loss", remembered)
    data, output = tmp_path / "data", tmp_path / "student"
    handwritten_geometry.write(data, seed=0, train=8, validation=1, test=1)
    arguments = ["--teacher", teacher.target, "--student", str(model_folder("student")), "--data", str(data)]
    arguments += ["--steps", "2", "--prompts", "2", "--rollouts", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["trl_trainer.py", *arguments])
    example.main()

    (inputs, logits, loss), (_, teacher_head, _) = batches
    (config,) = configs
    mask = inputs["completion_mask"].bool()
    weights, length = inputs["token_weights"].double(), mask.shape[1]
    assert mask.shape[0] == 3  # one whole group in a microbatch
    teacher_logits = inputs["teacher_hidden"].double() @ teacher_head.double().T
    student = logits[:, -length - 1 : -1, : teacher_head.shape[0]].double().log_softmax(-1)
    kl = (student.exp() * (student - teacher_logits.log_softmax(-1))).sum(-1)
    expected = (weights * kl)[mask].sum() / 2
    # Two float32 forwards of the student, the teacher's sums over D, and the weighted sum.
    error = divergences.error(
        divergences.full,
        student[mask],
        teacher_logits[mask],
        tolerance.forward(config) * student[mask].abs().amax(-1, keepdim=True),
        tolerance.product(inputs["teacher_hidden"][mask], teacher_head),
    )
    weights, kl = weights[mask], kl[mask]
    error = (weights * error).sum() / 2 + tolerance.gamma(len(kl)) * expected
    assert_within(loss, expected, error)
    # The heaviest token off by 1 %, the other divergence, and plain means in place of the weights.
    reverse = divergences.full(teacher_logits[mask].log_softmax(-1), student[mask]).sum(-1)
    assert_noticed(expected + 0.01 * (weights * kl).max() / 2, expected, error)
    assert_noticed((weights * reverse).sum() / 2, expected, error)
    assert_noticed((weights.mean() * kl).sum() / 2, expected, error)
    assert (output / "model.safetensors").read_bytes() != (model_folder("student") / "model.safetensors").read_bytes()
