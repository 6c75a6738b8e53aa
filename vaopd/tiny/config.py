"""Sizes and training recipes of the tiny models.

Teacher and student differ in their training data, hardly in size: the student knows the language and the arithmetic but
has seen only two scans of each digit, so it has yet to learn to read. The vocabularies are padded to different widths,
as real LM heads are. The teachers' heads are untied, as in Qwen3-VL-8B; the student's is tied, as in the 2B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vaopd.data.handwritten_geometry import COMMON_FIRST, COMMON_LAST
from vaopd.errors import InvalidInput

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
class TinyRecipe:
    """The training of one model; the optimiser is the same for all (pretrain.py)."""

    steps: int
    read_only_steps: int
    """The first steps train only reading: the vision tower then learns several times faster."""
    read_share: float
    """Share of reading questions in the other steps, 0 to 1."""
    scans_per_digit: int | None
    """None: every scan of the training split."""
    pixelated_share: float
    """Share of images shown pixelated to 10 %, with the numbers of another figure as the target. With them, a teacher
    learns a calibrated guess for a number that it can't see; without them, it answers every such number with the same
    digit, and VA then depends on the digit. (With the true numbers as the target, a teacher learnt to read half of the
    pixelated figures from their grey levels, and VA all but vanished.)"""
    habit: tuple[float, ...]
    """Probability of each phrasing, see `vaopd.data.handwritten_geometry`."""
    seed: int


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Shape and training of one model."""

    size: TinySize
    recipe: TinyRecipe


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
MODELS: dict[str, TinyModel] = {
    "teacher": TinyModel(_SIZE, _TEACHER),
    "student": TinyModel(replace(_SIZE, vision_depth=2, deepstack=(0,), padded_vocab=496, tied=True), _STUDENT),
    "teacher-small": TinyModel(_SMALL, replace(_TEACHER, seed=3)),
    "teacher-large": TinyModel(replace(_SIZE, hidden=192, vision_depth=4), replace(_TEACHER, steps=2500, seed=4)),
}


def find_model(name: str) -> TinyModel:
    """Returns a model of the table. Raises InvalidInput for an unknown name."""
    if name not in MODELS:
        raise InvalidInput(f"there is no tiny model {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name]
