"""The configuration of a run: one TOML file, one pydantic model, a section for each concern.

`load_config(path, overrides)` reads a file; `--set section.key=value` on the command line overrides a field. Wrong
keys, types and paths are named with the remedy. Importing this module loads nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pydantic
import tomli_w
from pydantic import Field

from vaopd.config.method import DegradationConfig, ObjectiveConfig, ScaledDegradation, TeacherConfig, VaOpd
from vaopd.config.toml import NAME, QUEUE_URL, Address, Fraction, Section, apply_overrides, read_toml, validate
from vaopd.config.training import (
    EvaluationConfig,
    FolderWeights,
    RolloutConfig,
    TrainerConfig,
    VllmRollout,
    WeightsConfig,
)
from vaopd.errors import ConfigError
from vaopd.files.secret import read_secret
from vaopd.net.passwords import add_password, split_password


class RunConfig(Section):
    """A run's name and folder."""

    name: str = Field(pattern=NAME, max_length=128)
    """Names the run's folder and, in Redis and at the teacher, its job."""
    folder: Path = Path("runs")
    """Where run folders are made; metrics, checkpoints, policy snapshots and logs lie in FOLDER/NAME."""
    seed: int = 0
    """Seeds the order of the prompts and the sampling of the rollouts."""


class ColumnsConfig(Section):
    """Names of columns other than Geometry3K's or ViRL39K's; validation_source may have either."""

    text: str = ""
    """The question; empty: problem or question."""
    images: str = ""
    """One image or a list; empty: images or image."""
    answer: str = ""
    """The reference, which evaluation needs and training doesn't; empty: answer."""
    id: str = ""
    """Names a record in logs and reports; empty: qid or id, else its number."""
    system: str = ""
    """A system prompt of each record; empty: `data.system_prompt` for all."""
    messages: str = ""
    """Turns {role, content} or {from, value} in place of the question; a last turn of the assistant is left out."""


class DataConfig(Section):
    """The problems to train and to evaluate on."""

    source: str
    """A local folder of Parquet or JSON Lines, or a hub id such as hiyouga/geometry3k."""
    subset: str = ""
    """The configuration of a hub id that has several, such as "main"."""
    columns: ColumnsConfig = ColumnsConfig()
    train_split: str = "train"
    """The split to train on."""
    validation_source: str = ""
    """Where held-out problems come from; empty: `source`."""
    validation_subset: str = ""
    """As `subset`, of validation_source."""
    validation_split: str = "validation"
    """The split that evaluation reads."""
    instruction: str = ""
    """Appended to every question, e.g. how to state the final answer."""
    system_prompt: str = ""
    """A system prompt before every question."""
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


class LoraConfig(Section):
    """Low-rank adapters (LoRA) learn in place of the student's own weights; no dropout."""

    rank: int = Field(ge=1, le=512)
    """Rank of the matrices; 16 to 64 are usual. The section as a whole is left out for a student that learns whole."""
    alpha: int = Field(32, ge=1)
    """What an adapter adds is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Linear layers with adapters, by the last part of their names, e.g. q_proj; empty: all but the LM head."""
    start: Path | None = None
    """Folder of adapters to begin with, in PEFT's form (RUN/adapter), of this rank, alpha and layers; left out: new
    ones, which add nothing yet."""


class StudentConfig(Section):
    """The model that is trained."""

    model: str
    """Folder or hub id of the student."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute precision; log-softmax, KL and reductions are always float32."""
    train_vision_tower: bool = True
    """Whether the vision tower learns too (paper: yes); with LoRA: whether its layers have adapters."""
    lora: LoraConfig | None = None
    """Low-rank adapters; left out: all weights learn."""


QUEUE_PASSWORD, QUEUE_PASSWORD_FILE = "VAOPD_QUEUE_PASSWORD", "VAOPD_QUEUE_PASSWORD_FILE"
"""The first is set by `vaopd up` for its processes; people name a file."""


class QueueConfig(Section):
    """The queue between the trainer and the workers."""

    url: str = Field("redis://127.0.0.1:6379/0", pattern=QUEUE_URL)
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
            try:
                url, password = split_password(values["url"])
            except ValueError as error:
                raise ValueError(f"url can't be used: {error}") from None
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

        Raises ConfigError for a file that can't be read, is empty or is open to others, and for no URL of a server.
        """
        if self.url == "embedded":
            raise ConfigError(
                'queue.url = "embedded" is for `vaopd up`, which starts a Valkey; name a running one: --set '
                "queue.url=redis://HOST:PORT/0"
            )
        password = self._password or os.environ.get(QUEUE_PASSWORD)
        file = os.environ.get(QUEUE_PASSWORD_FILE) or self.password_file
        if password is None and file:
            try:
                password = read_secret(Path(file), what="password file").decode().strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise ConfigError(f"queue.password_file {str(file)!r} can't be read ({reason})") from None
            if not password:
                raise ConfigError(f"queue.password_file {str(file)!r} is empty; write Redis's password into it")
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
    weights: WeightsConfig = FolderWeights()
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
        if self.objective.needs_both_views and (payload := self.teacher.payload) != "hidden_pair":
            raise ValueError(
                'objective.token_score = "expected" compares both views of the teacher over the whole vocabulary, and '
                f'teacher.payload = "{payload}" doesn\'t carry them; set teacher.payload = "hidden_pair", or '
                'choose objective.token_score = "view_divergence"'
            )
        if self.teacher.shared_base:
            self._check_shared_base()
        return self

    def _check_shared_base(self) -> None:
        needs = "teacher.shared_base lets the trainer compute the teacher as the student without its adapters: "
        sharding = self.trainer.sharding.kind
        if self.student.lora is None:
            raise ValueError(f"{needs}set [student.lora], or serve a teacher")
        if self.student.lora.start is None:
            raise ValueError(
                f"{needs}a student that begins as its base learns nothing from it; set student.lora.start to the "
                "adapters that it shall begin with, or choose another teacher"
            )
        if self.teacher.model != self.student.model:
            raise ValueError(
                f"{needs}teacher.model = {self.teacher.model} has to be student.model = {self.student.model}"
            )
        if sharding != "none":
            raise ValueError(
                f'{needs}each rank computes its own groups, which trainer.sharding.kind = "{sharding}" doesn\'t allow; '
                'set "none", or serve the base as a teacher'
            )
        if self.objective.columns:
            raise ValueError(
                f"{needs}it has no column {', '.join(self.objective.columns)}, which objective.token_score needs; "
                "choose another one, or serve the base as a teacher"
            )

    @property
    def prompt_limit(self) -> tuple[int, str]:
        """Tokens that a prompt may have, and the setting that says so; a response must fit in after it."""
        limits = [(self.data.max_prompt_tokens, f"data.max_prompt_tokens = {self.data.max_prompt_tokens}")]
        if isinstance(self.rollout, VllmRollout) and (context := self.rollout.engine_options.get("max_model_len")):
            response = self.rollout.max_new_tokens
            origin = f"rollout.engine_options.max_model_len = {context} less rollout.max_new_tokens = {response}"
            limits.append((int(context) - response, origin))
        return min(limits)

    @property
    def run_folder(self) -> Path:
        """The folder of everything that the run writes: run.folder / run.name."""
        return self.run.folder / self.run.name

    @property
    def snapshots_folder(self) -> Path:
        """The folder in which policy/ lies, absolute, since workers with another working folder read there.

        Elsewhere than in the run's folder, runs of one name in several `run.folder`s have one each: a run removes what
        an earlier one of its name left there.
        """
        run = self.run_folder.resolve()
        if self.weights.folder is None:
            return run
        return self.weights.folder.resolve() / f"{self.run.name}-{sha256(os.fsencode(run)).hexdigest()[:8]}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies overrides such as "trainer.steps=10". Raises ConfigError with key and remedy."""
    values = read_toml(path)
    apply_overrides(Config, values, overrides)
    return validate(Config, values, origin=f"{path} and the command line" if overrides else str(path))


def to_toml(config: Config) -> str:
    """Returns the resolved configuration as TOML that `load_config` reads back; fields that are None are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
