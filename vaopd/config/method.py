"""The sections of a run that say what the method is: teacher and payload, degraded view, objective.

Each is a discriminated union: a variant is a class with the fields that it alone knows, and refuses the others'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field

from vaopd.config.toml import Addresses, Fraction, Section, default_tag
from vaopd.types import DEGRADATIONS, STRENGTH_MEANINGS, Degradation, DegradationKind

if TYPE_CHECKING:
    _ScaledKind = DegradationKind
    _PlainKind = DegradationKind
else:
    _ScaledKind = Literal[tuple(kind for kind, meaning in DEGRADATIONS.items() if meaning)]
    _PlainKind = Literal[tuple(kind for kind, meaning in DEGRADATIONS.items() if not meaning)]


class _Teacher(Section):
    model: str
    """Folder or hub id of the teacher; only the teacher server reads it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute precision of the teacher server; the hidden payload travels in it."""
    device_map: str = "auto"
    """How accelerate places the weights: auto, balanced, sequential, cuda:0, cpu."""
    processes: int | None = Field(None, ge=1)
    """Ranks that share every text layer (tensor parallelism), a device each; device_map has then no effect. Empty: as
    many as the devices that `vaopd up --gpus` gives a teacher without a device_map, otherwise 1."""
    address: Addresses = "127.0.0.1:50051"
    """host:port where the server listens and where clients connect; for clients also several replicas, with commas."""
    batch_tokens: int = Field(16_384, ge=1)
    """Tokens (padding included) of one forward of the teacher."""
    shared_base: bool = False
    """The teacher is the model that the student's adapters are added to (student.lora): the trainer computes it with
    the adapters switched off, on the same weights in the student's dtype, and no teacher is started or called."""

    @property
    def needs_head(self) -> bool:
        """Whether the trainer applies the teacher's LM head to what travels."""
        return False

    def make_payload_keywords(self) -> dict[str, Any]:
        """Returns what the teacher's client takes of this section: `payload`, and `top_k` where it has an effect."""
        return self.model_dump(include={"payload", "top_k"})

    def make_loss_keywords(self) -> dict[str, Any]:
        """Returns what the student's loss takes of this section: `estimator`, where the payload needs one."""
        return {}


class HiddenTeacher(_Teacher):
    """Hidden states of the teacher travel: the exact KL, or at int8 half of the bytes, or those of both views."""

    payload: Literal["hidden", "hidden_int8", "hidden_pair"] = "hidden"
    """How the teacher's distribution travels: hidden (exact KL), hidden_int8 (half of it), hidden_pair (twice as much:
    both views, for objective.token_score = "expected"), top_k (+ tail), sampled."""

    @property
    def needs_head(self) -> bool:
        """Whether the trainer applies the teacher's LM head to what travels."""
        return True


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

    @property
    def needs_both_views(self) -> bool:
        """Whether the trainer needs the teacher's whole distributions of both views."""
        return False


class _RolloutWeighting(_Objective):
    temperature: float = Field(1.0, gt=0)
    """τ of the rollout weights: the larger, the more equal they are (paper: 1)."""
    rollout_deviation_floor: float = Field(0.0, ge=0)
    """A smaller standard deviation of siblings' mean VA counts as this, in nats (paper: 0). With 0.02, siblings that
    hardly differ get about the same weight."""


class _TokenGrouping(_Objective):
    high_fraction: float = Field(0.2, gt=0, le=1)
    """Fraction of a rollout's tokens that form the high group V."""
    high_weight: Fraction = 0.5
    """lambda: the share of the loss that the high group gets."""
    token_score: Literal["va", "view_divergence", "absolute", "expected"] = "va"
    """Ranks the tokens for the high group: va (paper); view_divergence, how much the teacher's whole distribution
    depends on the image; absolute, VA without its sign; expected, VA as it is expected of the student's own
    distribution, which needs teacher.payload = "hidden_pair" (docs/when_va_opd_helps.md)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names the columns that the teacher has to compute for it."""
        return ("view_divergence_nats",) if self.token_score == "view_divergence" else ()

    @property
    def needs_both_views(self) -> bool:
        """Whether the trainer needs the teacher's whole distributions of both views."""
        return self.token_score == "expected"


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
