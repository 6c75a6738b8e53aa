"""One step of the whole recipe on the tiny pair, and a plain reference of it in float64."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import nn

from tests.fundamentals import recipe
from tests.support.models import model_folder
from tests.support.teacher import teacher_in_process
from vaopd.client import SyncTeacherClient
from vaopd.config import Config, validate
from vaopd.data.loaders import load_prompts
from vaopd.payloads import to_torch
from vaopd.run.tensor_files import TensorStream
from vaopd.types import GroupId, Prompt, Rollout, RolloutGroup
from vaopd.vlm.model import Vlm
from vaopd.vlm.torchvision_compat import ensure_torchvision
from vaopd_trainer import step_numbers
from vaopd_trainer.loop import Trainer
from vaopd_trainer.prompt_order import PromptOrder, TrainingPrompts
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.scorer import GroupScorer
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss
from vaopd_trainer.student_weights import WholeWeights

BOUNDS = {"min_pixels": 20_000, "max_pixels": 60_000}
"""For the tiny pair, whose context is short: the first picture is enlarged, the second shrunk, the third as it is."""
STORED = ((131, 97), (411, 203), (200, 150))
LENGTHS = (1, 7, 20, 33)
"""Response tokens of four siblings; one has no low group."""


class Recorder:
    """Stands for the coordinator: hands out groups, and keeps what each step records."""

    def __init__(self, groups: Callable[[int], list[RolloutGroup]]) -> None:
        self.steps: list[dict[str, Any]] = []
        self.weights: list[np.ndarray] = []
        self.student: Any = None
        self._groups = groups

    def publish(self, version: int, weights: TensorStream) -> None:
        if isinstance(self.student, nn.Linear):  # as trained, not as rounded for the workers
            self.weights.append(self.student.weight[0].detach().numpy().copy())

    def distribute(self, step: int, submit: Callable[[list[RolloutGroup]], None]) -> None:
        for group in self._groups(step):
            submit([group])

    def record(self, step: int, sums: Any, own: dict[str, float], *, weighted: Any, kl: Any, **_: Any) -> None:
        self.steps.append({**step_numbers.average_ranks(sums), **own, "weighted": weighted, "kl_of_tokens": kl})

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def train(config: Config, loss: nn.Module, recorder: Recorder, scorer: Any) -> None:
    recorder.student = loss.model
    trainer = Trainer(
        config=config,
        accelerator=Accelerator(cpu=True),
        ranks=Ranks(),
        weights=WholeWeights(loss, model=recorder.student, settings=config.trainer, ranks=Ranks()),
        coordinator=recorder,  # type: ignore[arg-type]
    )
    trainer.run(scorer)


def make_picture(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    """Coarse and fine detail."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
    fine = PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return PIL.Image.blend(coarse, fine, 0.3)


def small_config(folder: Path) -> Config:
    """A data set of three problems with pictures of odd sizes, in a run of one step."""
    records = []
    for seed, size in enumerate(STORED):
        file = io.BytesIO()
        make_picture(seed, size).save(file, "PNG")
        text = f"<image>Find the perimeter of figure {seed}."
        records.append({"problem": text, "answer": "12", "images": [{"bytes": file.getvalue(), "path": None}]})
    pq.write_table(pa.Table.from_pylist(records), folder / "train.parquet")
    values = {
        "run": {"name": "r", "seed": 42},
        "data": {"source": str(folder), **BOUNDS},
        "student": {"model": str(model_folder("student")), "dtype": "float32"},
        "teacher": {"model": str(model_folder("teacher")), "dtype": "float32"},
        "trainer": {"steps": 1, "prompts_per_step": len(STORED)},
    }
    return validate(Config, values, origin="test")


def read_prompts(config: Config) -> Sequence[Prompt]:
    return load_prompts(config.data.source, split=config.data.train_split, instruction=config.data.instruction or None)


class Reference:
    """A model under transformers' own processor and whole forwards, in float64, over the recipe's own pictures."""

    def __init__(self, name: str) -> None:
        ensure_torchvision()
        from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(model_folder(name), **BOUNDS)
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(model_folder(name), dtype=torch.float64).eval()

    def read(self, question: str, picture: PIL.Image.Image) -> Any:
        """The question as released and the picture, in the chat template, and nothing else."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return self.processor(text=[text], images=[picture], return_tensors="pt")

    def logprobs(self, inputs: Any, response: np.ndarray) -> torch.Tensor:
        """(T, V) over the logical vocabulary."""
        ids = torch.cat([inputs["input_ids"], torch.from_numpy(response.astype(np.int64))[None]], dim=1)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(response)))
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            pixel_values=inputs["pixel_values"].double(),
            image_grid_thw=inputs["image_grid_thw"],
        ).logits
        rows: torch.Tensor = logits[0, -len(response) - 1 : -1, : len(self.processor.tokenizer)]
        return rows.double().log_softmax(-1)


class OneStep:
    """A step of the product and of the recipe over the same data set and the same sampled tokens."""

    def __init__(self, folder: Path) -> None:
        self.config = small_config(folder)
        self.student, self.teacher = Reference("student"), Reference("teacher")
        order = [int(PromptOrder(prompts=3, seed=42, per_step=3).index(place)) for place in range(3)]
        rng = np.random.default_rng(7)
        tokenizer = self.student.processor.tokenizer
        plain = np.setdiff1d(np.arange(200), tokenizer.all_special_ids)
        self.inputs: list[tuple[Any, Any]] = []
        self.responses: list[list[np.ndarray]] = []
        for index in order:
            scaled = recipe.scale(make_picture(index, STORED[index]), least=20_000, most=60_000)
            question = f"Find the perimeter of figure {index}."
            self.inputs.append(tuple(self.student.read(question, view) for view in (scaled, recipe.pixelate(scaled))))  # type: ignore[arg-type]
            drawn = [rng.choice(plain, length - 1) for length in LENGTHS]
            self.responses.append([np.array([*ids, tokenizer.eos_token_id], np.int32) for ids in drawn])
        self.recorder = Recorder(lambda step: [self.make_group(index) for index in range(3)])
        self.run_product()

    def make_group(self, index: int) -> RolloutGroup:
        group = str(GroupId(purpose="train", step=0, index=index))
        rollouts = tuple(
            Rollout(
                rollout_id=f"{group}/{k}",
                response_ids=response,
                rollout_logprobs=np.zeros(len(response), np.float32),
                finish_reason="stop",
            )
            for k, response in enumerate(self.responses[index])
        )
        return RolloutGroup(
            group_id=group,
            policy_version=0,
            policy_sha256="",
            prompt_token_ids=self.inputs[index][0]["input_ids"][0].numpy().astype(np.int32),
            rollouts=rollouts,
            worker="w",
            generation_s=0.1,
        )

    def run_product(self) -> None:
        student = Vlm.load(self.config.student.model, **BOUNDS)
        teacher = Vlm.load(self.config.teacher.model, **BOUNDS)
        prompts = TrainingPrompts(read_prompts(self.config), per_step=3, seed=42)
        with teacher_in_process(teacher) as server, SyncTeacherClient(server.target, payload="hidden") as client:
            scorer = GroupScorer(teacher=client, student=student, find_prompt=prompts.find_prompt, max_tokens=1024)
            loss = StudentLoss(student, teacher_head=to_torch(client.head()), trainer=self.config.trainer)
            train(self.config, loss, self.recorder, scorer)
            scorer.close()
        (self.step,) = self.recorder.steps
        self.scored: list[ScoredGroup] = [group.scored for group in self.step["weighted"]]

    def rows(self, reference: Reference, view: int) -> torch.Tensor:
        """(M, V) of all responses, group after group."""
        return torch.cat(
            [
                reference.logprobs(inputs[view], response)
                for inputs, responses in zip(self.inputs, self.responses, strict=True)
                for response in responses
            ]
        )
