"""LoRA against plain PEFT and plain transformers: gradients, one step, the merge, and the form of the files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import tolerance
from tests.support.families import FAMILIES, ask, family_folder, plain_logprobs, plain_model
from tests.support.teacher import drawing
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.config import LoraConfig, TrainerConfig
from vaopd.divergence import token_logprobs
from vaopd.errors import ConfigError, Mismatch
from vaopd.run.checkpoints import RunState
from vaopd.run.snapshots import publish_adapter, write_model
from vaopd.vlm.adapters import add_adapters, describe_adapters, load_adapters, merge_adapters, name_adapters
from vaopd.vlm.model import Segment, Vlm
from vaopd_trainer import checkpoint
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_weights import WholeWeights

pytestmark = pytest.mark.numeric

PICTURE = drawing(0)
LENGTHS = (9, 1, 17)
RATE = 1e-2


def a_student(family: str = "qwen3_vl", *, rank: int = 3, dtype: str = "float64") -> Vlm:
    """A student whose adapters add something already, else A would have no gradient."""
    student = Vlm.load(family_folder(family), dtype=dtype)
    add_adapters(student, LoraConfig(rank=rank, alpha=6), vision_tower=True, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    state = name_adapters(student.model.state_dict())
    load_adapters(student.model, {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()})
    return student


def publish(student: Vlm, folder: Path) -> Path:
    adapters = {name: tensor.contiguous() for name, tensor in name_adapters(student.model.state_dict()).items()}
    settings = describe_adapters(student.model, base=str(student.path))
    return Path(publish_adapter(folder, 0, adapters, settings=settings).path)


def responses() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 200, n) for n in LENGTHS)


def logprobs(student: Vlm) -> torch.Tensor:
    """Of all responses' tokens, as the trainer computes them."""
    segment = Segment(prompt=ask(student, [PICTURE]), responses=responses())
    hidden = student.compute_response_hidden([segment])
    return token_logprobs(hidden, student.head, torch.from_numpy(np.concatenate(responses())))


def test_one_step_is_plain_peft_s_and_leaves_the_base_weights_alone(tmp_path: Path) -> None:
    """PEFT loads our files over transformers' own model, one rollout at a time, with torch's AdamW; all in float64."""
    student = a_student()
    import peft  # after torchvision, which needs help on a CPU build

    base = {name: p.clone() for name, p in student.model.named_parameters() if not p.requires_grad}
    plain = peft.PeftModel.from_pretrained(
        copy.deepcopy(plain_model("qwen3_vl", dtype="float64")), publish(student, tmp_path), is_trainable=True
    ).double()
    for mine in (student.model, plain):
        optimizer = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=RATE, weight_decay=0.1)
        if mine is plain:
            for ids in responses():
                plain_logprobs(plain, student, [PICTURE], ids).sum().backward()
        else:
            logprobs(student).sum().backward()
        optimizer.step()

    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    mine_by_name = {f"base_model.model.{n}": p for n, p in student.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == mine_by_name.keys()
    assert any(".visual." in name for name in gradients)
    stepped = dict(plain.named_parameters())
    for name, bound in tolerance.backward(student.config, gradients, dtype=torch.float64).items():
        assert_within((mine_by_name[name].grad - gradients[name]).norm(), 0.0, bound, name)
        # AdamW's first step is the rate times g / |g|, which moves by 2·error / |g| with g's error, and at most by 2.
        moved = RATE * (2 * bound / gradients[name].abs()).clamp(max=2)
        assert_within(mine_by_name[name].detach(), stepped[name].detach(), moved + 1e-15, name)
    for name, before in base.items():
        assert torch.equal(dict(student.model.named_parameters())[name], before), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_trained_one_in_plain_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    student = a_student(family, dtype="float32")
    merged = merge_adapters(family_folder(family), publish(student, tmp_path), dtype=torch.float32)
    (folder := tmp_path / "model").mkdir()
    write_model(folder, merged, model_files_from=family_folder(family))

    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)

    with torch.no_grad():
        expected = torch.cat([plain_logprobs(plain, student, [PICTURE], ids) for ids in responses()])
        untrained = plain_model(family, dtype="float64")
        stale = torch.cat([plain_logprobs(untrained, student, [PICTURE], ids) for ids in responses()])
        found = logprobs(student)
    # Two float32 models, each with its own rounding: of the sum W + BA, and of the products.
    error = 2 * tolerance.forward(plain.config) * expected.abs().max()
    assert_within(found, expected, error)
    assert_noticed(stale, expected, error)


def test_adapters_of_another_rank_are_refused_by_name() -> None:
    student = a_student()
    with pytest.raises(Mismatch, match=r"lora_A\.weight; they belong to another model, rank"):
        load_adapters(student.model, name_adapters(a_student(rank=2).model.state_dict()))


def test_only_the_layers_that_are_named_get_adapters(tmp_path: Path) -> None:
    student = Vlm.load(family_folder("qwen3_vl"))
    with pytest.raises(ConfigError, match=r"target_modules names 'lm_head'; .* down_proj, gate_proj, .*_tower = false"):
        add_adapters(student, LoraConfig(rank=1, target_modules=("q_proj", "lm_head")), vision_tower=False)

    add_adapters(student, LoraConfig(rank=1, target_modules=("q_proj",)), vision_tower=False)

    named = json.loads((publish(student, tmp_path) / "adapter_config.json").read_text())["target_modules"]
    layers = student.config.text_config.num_hidden_layers
    assert named == [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(layers)]
    assert sum(p.requires_grad for p in student.model.parameters()) == 2 * layers


def test_a_checkpoint_of_adapters_continues_bit_for_bit(tmp_path: Path) -> None:
    """It holds adapters and their moments alone; the base weights come from the student's own folder."""
    settings = TrainerConfig(steps=9, learning_rate=RATE)

    def hold() -> tuple[Vlm, WholeWeights]:
        student = Vlm.load(family_folder("qwen3_vl"))
        add_adapters(student, LoraConfig(rank=3), vision_tower=True)
        loss = nn.ModuleDict({"model": student.model})
        return student, WholeWeights(loss, model=student.model, settings=settings, ranks=Ranks())

    def step(student: Vlm, weights: WholeWeights) -> None:
        logprobs(student).sum().backward()
        weights.optimizer.step()
        weights.optimizer.zero_grad()

    first, resumed = hold(), hold()
    step(*first)
    step(*first)
    saved = checkpoint.save(tmp_path, RunState(step=2), first[1], keep=1)
    assert load_file(saved / "student.safetensors").keys() == name_adapters(first[0].model.state_dict()).keys()

    checkpoint.load(saved, resumed[1])

    step(*first)
    step(*resumed)
    for name, tensor in first[1].list_weights().items():
        assert torch.equal(resumed[1].list_weights()[name], tensor), name
