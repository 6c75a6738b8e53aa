"""Compares AdamW, AdamW of 8 bits and adapters (LoRA) on the tiny pair, in pairs: the same groups in the same order.

`python benchmarks/optimizers.py` prints a table. The tiny student samples groups once and the tiny teacher scores them;
then each side takes the demo's steps on them, several times over. Held-out groups, scored as well, show what it learnt.
The demo itself samples anew in each step: these are not its accuracies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import groups
import tables
import torch

from vaopd.config import Config, load_config
from vaopd.data.handwritten_geometry import write
from vaopd.data.loaders import load_prompts
from vaopd.degradation import degrade, view_seed
from vaopd.images import decode
from vaopd.run.snapshots import publish_snapshot
from vaopd.sampling.transformers_engine import TransformersEngine
from vaopd.types import GroupId, GroupScore, Prompt, RolloutGroup
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_trainer import student_loss
from vaopd_trainer.compose import load_student
from vaopd_trainer.prompt_order import make_request
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss, WeightedGroup
from vaopd_trainer.student_weights import WholeWeights

STEPS, PER_STEP, TRAINED, HELD_OUT = 30, 12, 24, 12
WARMUP = 10
SIDES = {
    "AdamW, float32": (),
    "AdamW, 8 bits": ("trainer.optimizer=adamw_8bit",),
    "adapters of rank 16, 3e-3": ("student.lora.rank=16", "trainer.learning_rate=3e-3"),
}
ROOT = Path(__file__).parents[1]


def configure(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.toml", ["rollout.engine=transformers", *overrides])


def make_groups(config: Config, folder: Path) -> list[WeightedGroup]:
    """Samples by the student, scores by the teacher, weighs."""
    write(folder / "data", seed=0, train=TRAINED + HELD_OUT, validation=0, test=0)
    prompts = load_prompts(folder / "data", split="train")
    student, teacher = Vlm.load(config.student.model), Vlm.load(config.teacher.model)
    engine = TransformersEngine(config.student.model, worker="benchmark")
    engine.load_policy(publish_snapshot(folder, 0, student.model.state_dict(), model_files_from=student.path))
    ids = [GroupId(purpose="train", step=0, index=index) for index in range(len(prompts))]
    requests = [
        make_request(prompt, group=group, version=0, config=config) for prompt, group in zip(prompts, ids, strict=True)
    ]
    sampled: list[Any] = engine.generate(requests)
    results = groups.score(
        groups.engine_for(teacher),
        [prepare(config, teacher, prompt, group) for prompt, group in zip(prompts, sampled, strict=True)],
    )
    return [
        weigh(config, student, index, prompt, group, result)
        for index, (prompt, group, result) in enumerate(zip(prompts, sampled, results, strict=True))
    ]


def prepare(config: Config, teacher: Vlm, prompt: Prompt, group: RolloutGroup) -> PreparedGroup:
    pictures = {image.sha256: decode(image) for image in prompt.images}
    degradation = config.degradation.as_degradation()
    views = [
        pictures,
        {sha: degrade(picture, degradation, seed=view_seed(sha)) for sha, picture in pictures.items()},
    ]
    original, degraded = (
        teacher.render(prompt.messages, {sha: teacher.prepare_image(picture) for sha, picture in view.items()})
        for view in views
    )
    return PreparedGroup(
        group_id=group.group_id,
        original=original,
        degraded=degraded,
        responses=tuple(rollout.response_ids.astype("int64") for rollout in group.rollouts),
        payload="hidden",
        top_k=0,
    )


def weigh(
    config: Config, student: Vlm, index: int, prompt: Prompt, group: RolloutGroup, result: EngineResult
) -> WeightedGroup:
    ends = torch.tensor([len(rollout.response_ids) for rollout in group.rollouts]).cumsum(0)[:-1].tolist()
    split = {name: tuple(torch.from_numpy(c).tensor_split(ends)) for name, c in result.columns.items()}
    rows = {name: tuple(part.numpy() for part in parts) for name, parts in split.items()}
    read = student.render(prompt.messages, {i.sha256: student.prepare_image(decode(i)) for i in prompt.images})
    score = GroupScore(
        group_id=group.group_id,
        teacher_logprobs=rows["teacher_logprobs"],
        degraded_logprobs=rows["degraded_logprobs"],
        visual_advantage=rows["visual_advantage"],
        payload=result.payload,
        prompt_tokens=len(read.token_ids),
    )
    scored = ScoredGroup(index=index, group=group, prompt=read, score=score)
    return student_loss.weigh(scored, config.objective, seed=index)


def train(config: Config, teacher_head: torch.Tensor, scored: Sequence[WeightedGroup]) -> dict[str, Any]:
    """Takes the steps on the first groups -> loss of the first and last pass, KL of the others before and after."""
    torch.manual_seed(0)
    student = load_student(config)
    loss = StudentLoss(student, teacher_head=teacher_head, trainer=config.trainer)
    weights = WholeWeights(loss, model=student.model, settings=config.trainer, ranks=Ranks())
    start = {name: tensor.clone() for name, tensor in weights.list_weights().items()}
    trained, held_out = scored[:TRAINED], scored[TRAINED:]
    before, losses = measure(loss, held_out), []
    for step in range(STEPS):
        first = step * PER_STEP % TRAINED
        value = loss(trained[first : first + PER_STEP])[0] / PER_STEP
        value.backward()
        weights.clip(config.trainer.max_grad_norm)
        for group in weights.optimizer.param_groups:
            group["lr"] = config.trainer.learning_rate * min(1.0, (step + 1) / WARMUP)
        weights.optimizer.step()
        weights.optimizer.zero_grad()
        losses.append(float(value.detach()))
    moments = sum(tensor.nbytes for tensor in weights.list_moments().values())
    moved = {name: tensor.detach() - start[name] for name, tensor in weights.list_weights().items()}
    return {"losses": losses, "before": before, "after": measure(loss, held_out), "moments": moments, "moved": moved}


@torch.no_grad()
def measure(loss: StudentLoss, held_out: Sequence[WeightedGroup]) -> float:
    """Returns the mean KL of a token, in nats."""
    return float(loss(held_out)[1].kl.mean())


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())


def main() -> None:
    groups.quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vaopd-optimizers-") as folder:
        scored = make_groups(configure(), Path(folder))
    head = Vlm.load(configure().teacher.model).head.detach()
    found = {name: train(configure(*overrides), head, scored) for name, overrides in SIDES.items()}
    whole = found["AdamW, float32"]["moved"]
    rows = []
    for name, side in found.items():
        apart = ""
        if side["moved"].keys() == whole.keys():
            difference = {key: tensor - whole[key] for key, tensor in side["moved"].items()}
            apart = f"{norm(difference) / norm(whole):.1%}"
        state, last = f"{side['moments'] / 1e6:.2f} MB", side["losses"][-TRAINED // PER_STEP :]
        losses = [f"{side['losses'][0]:.4f}", f"{sum(last) / len(last):.4f}"]
        rows.append([name, state, *losses, f"{side['before']:.4f}", f"{side['after']:.4f}", apart])
    tables.table(
        f"{STEPS} steps of {PER_STEP} groups",
        ("optimizer", "its state", "first loss", "last losses", "held-out KL before (nats)", "after", "weights apart"),
        rows,
        "Weights apart: norm of the difference from AdamW's, over the norm of AdamW's way.",
    )


if __name__ == "__main__":
    main()
