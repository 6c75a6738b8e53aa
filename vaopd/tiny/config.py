"""Sizes and training recipes of the tiny models, of two tasks.

Teacher and student differ in their training data, hardly in size. The student of handwritten geometry, the demo's,
knows the language and the arithmetic but has seen only two scans of each digit, so it has yet to learn to read. That of
handwritten cards, for `make claims`, can read and has got used to not looking. The vocabularies are padded to different
widths, as real LM heads are. The teachers' heads are untied, as in Qwen3-VL-8B; the students' are tied, as in the 2B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vaopd.data.handwritten_cards import Habit
from vaopd.data.handwritten_geometry import COMMON_FIRST, COMMON_LAST
from vaopd.errors import InvalidInput

Task = Literal["geometry", "cards"]

HEAD_DIM = 32
"""vLLM's CPU attention has kernels for 32, 64 and 128, none for 16."""
PATCH_PX = 16
MERGE = 2
MAX_POSITIONS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySize:
    """The shape of one model. Both towers have hidden / HEAD_DIM heads, and MLPs twice as wide as hidden."""

    hidden: int
    layers: int
    kv_heads: int
    vision_hidden: int
    vision_depth: int
    deepstack: tuple[int, ...]
    padded_vocab: int
    tied: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recipe:
    """The training of one model; the optimiser is the same for all (pretrain.py)."""

    steps: int
    read_only_steps: int
    """The first steps train only reading: the vision tower then learns several times faster."""
    pixelated_share: float
    """Share of images shown pixelated to 10 %, with the numbers of another figure as the target. With them, a teacher
    learns a calibrated guess for a number that it can't see; without them, it answers every such number with the same
    digit, and VA then depends on the digit. (With the true numbers as the target, a teacher learnt to read half of the
    pixelated figures from their grey levels, and VA all but vanished.)"""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyRecipe(_Recipe):
    """The training of a model of handwritten geometry."""

    read_share: float
    """Share of reading questions in the other steps, 0 to 1."""
    scans_per_digit: int | None
    """None: every scan of the training split."""
    habit: tuple[float, ...]
    """Probability of each phrasing, see `vaopd.data.handwritten_geometry`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardsRecipe(_Recipe):
    """The training of a model of handwritten cards, on every scan of the training split."""

    neglecting_steps: int = 0
    """In the last steps most digits come from a prior: the model can still read, and has got used to not looking."""
    neglect: float = 0.6
    """The share of digits that come from the prior in these steps."""
    habit: Habit
    """Whose words follow each other, see `vaopd.data.handwritten_cards`."""


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Shape and training of one model."""

    size: TinySize
    recipe: TinyRecipe | CardsRecipe

    @property
    def task(self) -> Task:
        """The task that it was trained on."""
        return "cards" if isinstance(self.recipe, CardsRecipe) else "geometry"


_SIZE = TinySize(
    hidden=128,
    layers=4,
    kv_heads=2,
    vision_hidden=64,
    vision_depth=3,
    deepstack=(1,),
    padded_vocab=512,
    tied=False,
)
_SMALL = replace(_SIZE, hidden=96, layers=3, kv_heads=1, vision_hidden=32, vision_depth=2, deepstack=(0,))
_TEACHER = TinyRecipe(
    steps=3000,
    read_only_steps=800,
    read_share=0.2,
    scans_per_digit=None,
    pixelated_share=0.1,
    habit=COMMON_FIRST,
    seed=1,
)
_STUDENT = TinyRecipe(
    steps=800,
    read_only_steps=100,
    read_share=0.1,
    scans_per_digit=2,
    pixelated_share=0.0,
    habit=COMMON_LAST,
    seed=2,
)
_CARDS_STUDENT = replace(
    _SIZE, hidden=96, layers=2, kv_heads=1, vision_depth=2, deepstack=(0,), padded_vocab=624, tied=True
)
_CARDS_TEACHER = replace(_CARDS_STUDENT, hidden=128, layers=3, kv_heads=2, padded_vocab=640, tied=False)
_CARDS = CardsRecipe(steps=900, read_only_steps=300, pixelated_share=0.15, habit="teacher", seed=5)
_NEGLECTING = CardsRecipe(
    steps=650, read_only_steps=300, neglecting_steps=150, pixelated_share=0.0, habit="student", seed=6
)
UNSHIPPED = ("cards-teacher-small", "cards-teacher-large")
"""`make claims` makes these when it comes to them."""
MODELS: dict[str, TinyModel] = {
    "teacher": TinyModel(_SIZE, _TEACHER),
    "student": TinyModel(replace(_SIZE, vision_depth=2, deepstack=(0,), padded_vocab=496, tied=True), _STUDENT),
    "teacher-small": TinyModel(_SMALL, replace(_TEACHER, seed=3)),
    "teacher-large": TinyModel(replace(_SIZE, hidden=192, vision_depth=4), replace(_TEACHER, steps=2500, seed=4)),
    "cards-teacher": TinyModel(_CARDS_TEACHER, _CARDS),
    "cards-teacher-small": TinyModel(replace(_CARDS_STUDENT, padded_vocab=640, tied=False), replace(_CARDS, seed=7)),
    "cards-teacher-large": TinyModel(replace(_CARDS_TEACHER, hidden=192, layers=4), replace(_CARDS, seed=8)),
    "cards-student": TinyModel(_CARDS_STUDENT, _NEGLECTING),
}


def find_model(name: str) -> TinyModel:
    """Returns a model of the table. Raises InvalidInput for an unknown name."""
    if name not in MODELS:
        raise InvalidInput(f"there is no tiny model {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name]
