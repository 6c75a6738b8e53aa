"""The configuration of a run: one TOML file, one pydantic model, a section for each concern.

A section with variants is a discriminated union: each variant is a class with the fields that it alone knows, and
refuses the others'. `load_config(path, overrides)` reads a file; `--set section.key=value` on the command line
overrides a field. Wrong keys, types and paths are named with the remedy. Importing this module loads nothing heavy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction as ExactFraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import tomli_w
from pydantic import Discriminator, Field

from vaopd.config.old_names import Warn, accept_run_keys, warn_once
from vaopd.config.toml import Section, apply_overrides, default_tag, read_toml, validate
from vaopd.errors import ConfigError
from vaopd.files.secret import read_secret
from vaopd.net.passwords import add_password, split_password
from vaopd.types import DEGRADATIONS, STRENGTH_MEANINGS, Degradation, DegradationKind

if TYPE_CHECKING:
    _ScaledKind = DegradationKind
    _PlainKind = DegradationKind
else:
    _ScaledKind = Literal[tuple(kind for kind, meaning in DEGRADATIONS.items() if meaning)]
    _PlainKind = Literal[tuple(kind for kind, meaning in DEGRADATIONS.items() if not meaning)]

Fraction = Annotated[float, Field(ge=0, le=1)]
_ADDRESS = r"(?:[^:,\s]+|\[[0-9a-fA-F:]+\]):\d+"
Address = Annotated[str, Field(pattern=rf"^{_ADDRESS}$")]
Addresses = Annotated[str, Field(pattern=rf"^{_ADDRESS}(?:, ?{_ADDRESS})*$")]


class RunConfig(Section):
    """A run's name and folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder and, in Redis and at the teacher, its job."""
    folder: Path = Path("runs")
    """Where run folders are made; metrics, checkpoints, policy snapshots and logs lie in FOLDER/NAME."""
    seed: int = 0
    """Seeds the order of the prompts and the sampling of the rollouts."""


class DataConfig(Section):
    """The problems to train and to evaluate on."""

    source: str
    """A local folder of Parquet files, or a hub id such as hiyouga/geometry3k."""
    train_split: str = "train"
    """The split to train on."""
    validation_source: str = ""
    """Where held-out problems come from; empty: `source`."""
    validation_split: str = "validation"
    """The split that evaluation reads."""
    instruction: str = ""
    """Appended to every question, e.g. how to state the final answer."""
    bad_records: Literal["error", "skip"] = "error"
    """A record that can't be used is named and keeps the run from starting, or is left out and counted."""
    max_bad_fraction: Fraction = 0.01
    """With bad_records = "skip": the largest share of bad records in a split; above it the run doesn't start."""
    max_prompt_tokens: int = Field(8192, ge=1)
    """A longer prompt, image tokens included, is a bad record; no prompt is ever cut (paper: 8192)."""
    min_pixels: int | None = Field(None, ge=1)
    """Images are scaled up to at least this many pixels; empty: the processor's own (paper: 262144)."""
    max_pixels: int | None = Field(None, ge=1)
    """Images are scaled down to at most this many pixels; empty: the processor's own (paper: 4194304)."""


class StudentConfig(Section):
    """The model that is trained."""

    model: str
    """Folder or hub id of the student."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute precision; log-softmax, KL and reductions are always float32."""
    train_vision_tower: bool = True
    """Whether the vision tower learns too (paper: yes)."""


class _Teacher(Section):
    model: str
    """Folder or hub id of the teacher; only the teacher server reads it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute precision of the teacher server; the hidden payload travels in it."""
    device_map: str = "auto"
    """How accelerate places the weights: auto, balanced, sequential, cuda:0, cpu."""
    address: Addresses = "127.0.0.1:50051"
    """host:port where the server listens and where clients connect; for clients also several replicas, with commas."""
    batch_tokens: int = Field(16_384, ge=1)
    """Tokens (padding included) of one forward of the teacher."""

    def make_payload_keywords(self) -> dict[str, Any]:
        """Returns what the teacher's client takes of this section: `payload`, and `top_k` where it has an effect."""
        return self.model_dump(include={"payload", "top_k"})

    def make_loss_keywords(self) -> dict[str, Any]:
        """Returns what the student's loss takes of this section: `estimator`, where the payload needs one."""
        return {}


class HiddenTeacher(_Teacher):
    """Hidden states of the teacher travel: the exact KL, or at int8 half of the bytes."""

    payload: Literal["hidden", "hidden_int8"] = "hidden"
    """How the teacher's distribution travels: hidden (exact KL), hidden_int8 (half of it), top_k (+ tail), sampled."""


class TopKTeacher(_Teacher):
    """The likeliest tokens travel, and the rest as one tail."""

    payload: Literal["top_k"] = "top_k"
    """How the teacher's distribution travels."""
    top_k: int = Field(64, ge=1)
    """k: how many tokens of each position."""


class SampledTeacher(_Teacher):
    """Only the log-prob of the sampled token travels."""

    payload: Literal["sampled"] = "sampled"
    """How the teacher's distribution travels."""
    sampled_estimator: Literal["k1", "k3"] = "k3"
    """The single-sample estimator of the KL."""

    def make_loss_keywords(self) -> dict[str, Any]:
        """Returns the estimator."""
        return {"estimator": self.sampled_estimator}


TeacherConfig = Annotated[
    HiddenTeacher | TopKTeacher | SampledTeacher, Discriminator("payload"), default_tag("payload", "hidden")
]


class _Degradation(Section):
    def as_degradation(self) -> Degradation:
        """Returns it as the teacher's client takes it."""
        return Degradation(**self.model_dump())


class ScaledDegradation(_Degradation):
    """A degradation that can be weaker or stronger."""

    kind: _ScaledKind = "pixelate"
    """The degraded view (paper: pixelate). The others are for experiments."""
    strength: float = Field(0.1, gt=0, le=1, description=f"{STRENGTH_MEANINGS}.")


class PlainDegradation(_Degradation):
    """A degradation that leaves nothing to choose."""

    kind: _PlainKind
    """The degraded view."""


DegradationConfig = Annotated[
    ScaledDegradation | PlainDegradation, Discriminator("kind"), default_tag("kind", "pixelate")
]


class _Objective(Section):
    def as_keywords(self) -> dict[str, Any]:
        """Returns `variant` and its own fields, as keyword arguments of `objective.group_weights`."""
        return self.model_dump(exclude={"token_score"})  # a name here, numbers there

    @property
    def columns(self) -> tuple[str, ...]:
        """Names the columns that the teacher has to compute for it."""
        return ()


class _RolloutWeighting(_Objective):
    temperature: float = Field(1.0, gt=0)
    """tau of the rollout weights (method.md, "Rollout weights")."""
    rollout_deviation_floor: float = Field(0.0, ge=0)
    """A smaller standard deviation of siblings' mean VA counts as this, in nats (paper: 0). With 0.02, siblings that
    hardly differ get about the same weight."""


class _TokenGrouping(_Objective):
    high_fraction: float = Field(0.2, gt=0, le=1)
    """Fraction of a rollout's tokens that form the high group V."""
    high_weight: Fraction = 0.5
    """lambda: the share of the loss that the high group gets."""
    token_score: Literal["va", "view_divergence", "absolute"] = "va"
    """Ranks the tokens for the high group: va (paper); view_divergence, how much the teacher's whole distribution
    depends on the image; absolute, VA without its sign (docs/claims.md)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names the columns that the teacher has to compute for it."""
        return ("view_divergence_nats",) if self.token_score == "view_divergence" else ()


class VaOpd(_RolloutWeighting, _TokenGrouping):
    """The paper's loss: rollout weights and token groups."""

    variant: Literal["va_opd"] = "va_opd"
    """The loss: the paper's, the baseline, either component alone, or the baseline with tokens masked out."""


class StandardOpd(_Objective):
    """The baseline: every token of every rollout weighs the same."""

    variant: Literal["standard"] = "standard"
    """The loss."""


class RolloutWeightsOnly(_RolloutWeighting):
    """The paper's rollout weights alone."""

    variant: Literal["rollout_weights"] = "rollout_weights"
    """The loss."""


class TokenGroupsOnly(_TokenGrouping):
    """The paper's token groups alone."""

    variant: Literal["token_groups"] = "token_groups"
    """The loss."""


class MaskedOpd(_Objective):
    """The baseline without some of the tokens."""

    variant: Literal["masked"] = "masked"
    """The loss."""
    mask: Literal["top", "bottom", "random"] = "top"
    """Which tokens are dropped, by VA."""
    mask_fraction: Fraction = 0.1
    """How many of a rollout's tokens are dropped."""
    mask_ties: Literal["earlier", "random"] = "earlier"
    """Of tokens with equal VA, which count as the larger: the earlier ones, so that the bottom ones are the answer's
    end, or random ones, drawn by the run's seed."""


ObjectiveConfig = Annotated[
    VaOpd | StandardOpd | RolloutWeightsOnly | TokenGroupsOnly | MaskedOpd,
    Discriminator("variant"),
    default_tag("variant", "va_opd"),
]


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


class TrainerConfig(Section):
    """The optimizer, the batches and the checkpoints."""

    steps: int = Field(ge=1)
    """Optimizer steps in all; the schedule ends there."""
    prompts_per_step: int = Field(16, ge=1)
    """B (paper: 16)."""
    rollouts_per_prompt: int = Field(4, ge=1)
    """K (paper: 4)."""
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
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl, which is always written."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: the fraction of all steps, exactly, rounded down."""
        return math.floor(ExactFraction(str(self.warmup_fraction)) * self.steps)


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


QUEUE_PASSWORD, QUEUE_PASSWORD_FILE = "VAOPD_QUEUE_PASSWORD", "VAOPD_QUEUE_PASSWORD_FILE"
"""The first is set by `vaopd up` for its processes; people name a file."""


class QueueConfig(Section):
    """The queue between the trainer and the workers."""

    url: str = Field("redis://127.0.0.1:6379/0", pattern=r"^(rediss?|unix)://|^embedded$")
    """Redis or Valkey; `embedded` lets `vaopd up` start a Valkey of its own. A password in it is never written down."""
    password_file: Path | None = None
    """The file with Redis's password, readable by its owner alone; also `VAOPD_QUEUE_PASSWORD_FILE`."""
    lease_s: float = Field(60, gt=0)
    """A worker or trainer that is silent for this long loses its work to another."""
    max_deliveries: int = Field(5, ge=1)
    """Deliveries after which an entry becomes a dead letter."""
    _password: str | None = pydantic.PrivateAttr(None)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _take_password(cls, values: Any, validate: pydantic.ModelWrapValidatorHandler[QueueConfig]) -> QueueConfig:
        """Takes the password out of the URL, so that no dump, message or file holds it."""
        password = None
        if isinstance(values, dict) and isinstance(values.get("url"), str):
            url, password = split_password(values["url"])
            values = values | {"url": url}
        section = validate(values)
        if password is not None:
            section._password = password
        return section

    @property
    def own_password(self) -> str | None:
        """The password that the configured URL held, for the environment of child processes."""
        return self._password

    def find_url(self) -> str:
        """Returns the URL with the password, to open it with; the URL's own, else from file or environment.

        Raises ConfigError for a file that can't be read, or is open to others.
        """
        password = self._password or os.environ.get(QUEUE_PASSWORD)
        file = os.environ.get(QUEUE_PASSWORD_FILE) or self.password_file
        if password is None and file:
            try:
                password = read_secret(Path(file), what="password file").decode().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"queue.password_file {str(file)!r} can't be read ({error})") from None
        return add_password(self.url, password) if password else self.url


class ApiConfig(Section):
    """The scoring API."""

    address: Address = "127.0.0.1:8080"
    """host:port where the API listens."""


class Config(Section):
    """A whole run. A section without required keys may be left out."""

    run: RunConfig
    data: DataConfig
    student: StudentConfig
    teacher: TeacherConfig
    degradation: DegradationConfig = ScaledDegradation()
    objective: ObjectiveConfig = VaOpd()
    rollout: RolloutConfig = VllmRollout()
    trainer: TrainerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    queue: QueueConfig = QueueConfig()
    api: ApiConfig = ApiConfig()

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> Config:
        lowest, highest = self.data.min_pixels, self.data.max_pixels
        if lowest is not None and highest is not None and lowest > highest:
            raise ValueError(f"data.min_pixels = {lowest} is above data.max_pixels = {highest}; no image has both")
        if self.evaluation.temperature == 0 and self.evaluation.samples > 1:
            raise ValueError(
                f"evaluation.samples = {self.evaluation.samples} greedy answers would all be the same; "
                "set evaluation.samples = 1 or evaluation.temperature > 0"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """The folder of everything that the run writes: run.folder / run.name."""
        return self.run.folder / self.run.name


def load_config(path: str | Path, overrides: Sequence[str] = (), *, warn: Warn = warn_once) -> Config:
    """Reads a TOML file and applies overrides such as "trainer.steps=10".

    `warn` gets a line that names the old keys, if there are any. Raises ConfigError with key and remedy.
    """
    values = read_toml(path)
    apply_overrides(Config, values, overrides)
    accept_run_keys(Config, values, origin=str(path), warn=warn)
    return validate(Config, values, origin=str(path))


def to_toml(config: Config) -> str:
    """Returns the resolved configuration as TOML that `load_config` reads back; fields that are None are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
