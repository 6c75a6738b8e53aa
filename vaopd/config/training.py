"""The sections of a run that say how the student learns: rollouts, optimizer and batches, evaluation."""

from __future__ import annotations

import math
from fractions import Fraction as ExactFraction
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field

from vaopd.config.toml import Address, Fraction, Section, default_tag


class _Rollout(Section):
    workers: int = Field(1, ge=1)
    """How many workers `vaopd up` starts."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature (paper: 0.7)."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling (paper: 0.95)."""
    max_new_tokens: int = Field(4096, ge=1)
    """Responses are cut here and kept (paper: 4096)."""
    requests_per_batch: int = Field(16, ge=1)
    """How many prompt groups a worker holds at once."""
    tokens_in_flight: int = Field(524_288, ge=1)
    """A worker admits prompt groups while the rollouts in its engine may take so many tokens (128 rollouts of 4096)."""


class VllmRollout(_Rollout):
    """vLLM samples."""

    engine: Literal["vllm"] = "vllm"
    """The library that samples the rollouts."""
    requests_per_batch: int = Field(64, ge=1)
    """How many prompt groups a worker holds at once, sampled beside each other."""
    engine_options: dict[str, Any] = Field({})
    """Passed on to vLLM, e.g. tensor_parallel_size, gpu_memory_utilization, max_model_len."""


class TransformersRollout(_Rollout):
    """transformers' own `generate` samples: slower, and for every model that transformers knows."""

    engine: Literal["transformers"] = "transformers"
    """The library that samples the rollouts."""


RolloutConfig = Annotated[VllmRollout | TransformersRollout, Discriminator("engine"), default_tag("engine", "vllm")]


class NoSharding(Section):
    """Every rank holds the whole student: the fastest, where it fits."""

    kind: Literal["none"] = "none"
    """How the student is held by the trainer's ranks."""


class FullSharding(Section):
    """Each rank holds its share of weights, gradients and moments (FSDP2)."""

    kind: Literal["full"] = "full"
    """How the student is held by the trainer's ranks."""


class HybridSharding(Section):
    """Several ranks hold one copy together, sharded; the copies exchange gradients (HSDP)."""

    kind: Literal["hybrid"] = "hybrid"
    """How the student is held by the trainer's ranks."""
    ranks_per_copy: int | None = Field(None, ge=2)
    """Ranks that hold one copy; unset: those of a host, whose links are the fastest."""


ShardingConfig = Annotated[
    NoSharding | FullSharding | HybridSharding, Discriminator("kind"), default_tag("kind", "none")
]


class TrainerConfig(Section):
    """The optimizer, the batches and the checkpoints."""

    steps: int = Field(ge=1)
    """Optimizer steps in all; the schedule ends there."""
    prompts_per_step: int = Field(16, ge=1)
    """B (paper: 16)."""
    rollouts_per_prompt: int = Field(4, ge=1)
    """K (paper: 4)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW's moments: float32, or 8 bits each by bitsandbytes (2 bytes a parameter, not 8); not for sharding."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW (paper: 1e-6)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """β1 and β2 of AdamW (paper: 0.9, 0.95)."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of AdamW (paper: 0.1)."""
    warmup_fraction: Fraction = 0.05
    """Linear warm-up over this fraction of the steps, rounded down, then cosine to zero (paper: 5 %)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping (paper: 1.0)."""
    max_skipped_steps: int = Field(3, ge=1)
    """A step whose gradient is not finite changes nothing; after so many in a row the run ends and names the groups."""
    forward_tokens: int = Field(24_576, ge=1)
    """Tokens of one forward and backward, in whole groups; larger groups are split between siblings, and out of memory
    halves it. The default holds the paper's largest group: a prompt of 8192 tokens and four responses of 4096."""
    compile_layers: bool = True
    """Compiles the student's layers on a GPU: the first step takes about a minute longer, the others are faster."""
    chunk_tokens: int = Field(1024, ge=1)
    """Tokens for which the fused divergence holds (tokens, vocabulary) logits at once."""
    max_policy_lag: int = Field(0, ge=0)
    """How many versions old a group's policy may be (paper: 0). Above 0, sampling overlaps with training."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints; groups are acknowledged only then."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    processes: int = Field(1, ge=1)
    """Ranks of the trainer on this host, through accelerate."""
    sharding: ShardingConfig = NoSharding()
    """Whether each rank holds the whole student, or a share of it."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl, which is always written."""

    @pydantic.model_validator(mode="after")
    def _check_optimizer(self) -> TrainerConfig:
        if self.optimizer == "adamw_8bit" and self.sharding.kind != "none":
            raise ValueError(
                f'optimizer = "adamw_8bit" can\'t be sharded, and sharding.kind is {self.sharding.kind!r}; choose one'
            )
        return self

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: the fraction of all steps, exactly, rounded down."""
        return math.floor(ExactFraction(str(self.warmup_fraction)) * self.steps)


class _Weights(Section):
    folder: Path | None = None
    """Where the trainer writes each step's weights, e.g. /dev/shm: in FOLDER/NAME-…, a folder for each
    run; empty: the run's folder."""


class FolderWeights(_Weights):
    """Workers read the trainer's files: they are on its host, or mount them under the same path."""

    transport: Literal["folder"] = "folder"
    """How each step's weights reach the rollout workers: folder, or http for those on other hosts."""


class HttpWeights(_Weights):
    """Workers fetch the weights from the trainer: what changed since those that they have, or all."""

    transport: Literal["http"] = "http"
    """How each step's weights reach the rollout workers."""
    address: Address = "127.0.0.1:0"
    """host:port where the trainer listens and by which workers reach it; port 0: a free one."""


WeightsConfig = Annotated[FolderWeights | HttpWeights, Discriminator("transport"), default_tag("transport", "folder")]


class EvaluationConfig(Section):
    """The evaluation on held-out problems (avg@n)."""

    every: int = Field(50, ge=0)
    """Steps between evaluations on the validation split; 0 = never."""
    prompts: int = Field(200, ge=1)
    """Held-out problems (paper: 200)."""
    samples: int = Field(8, ge=1)
    """n of avg@n (paper: 8)."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature (paper: 1); 0 = greedy."""
    student_va_prompts: int = Field(64, ge=0)
    """Held-out problems with an image, one answer each, on which every evaluation measures the student's own VA: two
    forwards of the student, no sampling; 0 = never."""
