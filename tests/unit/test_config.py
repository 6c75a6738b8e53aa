"""The configuration: one TOML file; what is wrong in it is named with the key and the remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Discriminator

from vaopd.config import (
    Config,
    HiddenTeacher,
    MaskedOpd,
    PlainDegradation,
    RolloutWeightsOnly,
    SampledTeacher,
    Section,
    ServiceConfig,
    StandardOpd,
    TokenGroupsOnly,
    TopKTeacher,
    TransformersRollout,
    VaOpd,
    find_variants,
    load_config,
    to_toml,
    validate,
)
from vaopd.config.toml import apply_overrides, default_tag, find_section
from vaopd.errors import ConfigError
from vaopd.types import Degradation

MINIMAL = """
[run]
name = "first"
[data]
source = "datasets/geometry"
[student]
model = "models/student"
[teacher]
model = "models/teacher"
[trainer]
steps = 10
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def sections_of(model: type[Section]) -> list[type[Section]]:
    """A section and all below it, each variant of a union included."""
    found = [model]
    for field in model.model_fields.values():
        variants = find_variants(field)
        kinds = variants.members if variants else [field.annotation]
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        found += [section for kind in below for section in sections_of(kind)]
    return found


@pytest.mark.parametrize("model", [Config, ServiceConfig])
def test_every_field_is_documented(model: type[Section]) -> None:
    """The docstring under a field is its description."""
    assert [
        f"{section.__name__}.{name}"
        for section in sections_of(model)
        for name, field in section.model_fields.items()
        if not field.description and not find_section(field) and not find_variants(field)
    ] == []


def test_what_is_left_out_has_the_paper_s_value(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.trainer.learning_rate == 1e-6
    assert config.trainer.betas == (0.9, 0.95)
    assert config.degradation.as_degradation() == Degradation(kind="pixelate", strength=0.1)
    assert config.teacher.make_payload_keywords() == {"payload": "hidden"}
    assert config.teacher.make_loss_keywords() == {}
    assert config.run_folder == Path("runs/first")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.steps=3", ("trainer", "steps"), 3),
        ("trainer.learning_rate=4e-4", ("trainer", "learning_rate"), 4e-4),
        ("objective.variant=standard", ("objective", "variant"), "standard"),
        ("teacher.address=127.0.0.1:0", ("teacher", "address"), "127.0.0.1:0"),
        ("teacher.address=one:50051,[::1]:50052", ("teacher", "address"), "one:50051,[::1]:50052"),
        ("student.train_vision_tower=false", ("student", "train_vision_tower"), False),
        ("rollout.engine_options.max_model_len=256", ("rollout", "engine_options"), {"max_model_len": 256}),
        ("run.name=7", ("run", "name"), "7"),
        ("run.name=2026-11-27", ("run", "name"), "2026-11-27"),
        ("data.subset=true", ("data", "subset"), "true"),
        ("weights.folder=1e3", ("weights", "folder"), Path("1e3")),
    ],
)
def test_set_overrides_one_field(minimal: Path, override: str, key: tuple[str, str], value: object) -> None:
    section, name = key
    assert getattr(getattr(load_config(minimal, [override]), section), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepz=3", r"trainer\.stepz: no such key; did you mean steps\? Known here: steps, prompts_per_step"),
        ("trainer.steps=0", r"trainer\.steps: .*greater than or equal to 1, got 0"),
        (
            "trainer.steps=many",
            r"run\.toml and the command line:\n  trainer\.steps: should be a whole number, got 'many'",
        ),
        ("trainer.steps=2.5", r"trainer\.steps: should be a whole number, got 2\.5"),
        ("trainer.steps=true", r"trainer\.steps: should be a whole number, got 'true'"),
        ("trainer.learning_rate=true", r"trainer\.learning_rate: should be a number, got 'true'"),
        ("trainer.learning_rate=inf", r"trainer\.learning_rate: should be a finite number, got inf"),
        ("trainer.trackers=wandb", r"trainer\.trackers: should be a list, e\.g\. .*, got 'wandb'"),
        ("data.columns=text", r"data\.columns: should be a table, e\.g\. .*, got 'text'"),
        ("objective.variant=best", r"objective\.variant: .*'va_opd', 'standard'.*got 'best'"),
        ("run.name=../elsewhere", r"run\.name: should begin with a letter or digit .*, got '\.\./elsewhere'"),
        (f"run.name={129 * 'a'}", r"run\.name: .*at most 128"),
        ("teacher.address=localhost", r"teacher\.address: should be HOST:PORT, or several.*, got 'localhost'"),
        ("teacher.address=one:50051,two", r"teacher\.address: should be HOST:PORT"),
        ("api.address=localhost", r"api\.address: should be HOST:PORT, e\.g\. .*, got 'localhost'"),
        ("queue.url=localhost", r"queue\.url: should begin with redis://, .*, got 'localhost'"),
        ("teacher.payload=none", r"teacher\.payload: must be one of 'hidden', .*'sampled', got 'none'"),
        ("rollout.engine.name=vllm", r"rollout\.engine: must be one of 'vllm', 'transformers'"),
        ("student.lora.rnk=8", r"student\.lora\.rnk: no such key; did you mean rank\? Known here: rank, alpha"),
        ("data.min_pixels=0", r"data\.min_pixels: .* greater than or equal to 1, got 0"),
        ("steps=3", r"not of the form section\.key=value; do you mean trainer\.steps\?"),
        ("model=x", r"do you mean student\.model or teacher\.model\?"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_remedy(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [override])


def test_pixel_bounds_that_no_image_can_have_are_refused(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.min_pixels = 2048 is above data\.max_pixels = 1024"):
        load_config(minimal, ["data.min_pixels=2048", "data.max_pixels=1024"])
    load_config(minimal, ["data.min_pixels=1024", "data.max_pixels=1024"])


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"), [(655, 0.05, 32), (640, 0.05, 32), (100, 0.29, 29), (10, 0.05, 0), (7, 1.0, 7)]
)
def test_the_warm_up_is_the_exact_fraction_rounded_down(
    minimal: Path, steps: int, fraction: float, expected: int
) -> None:
    config = load_config(minimal, [f"trainer.steps={steps}", f"trainer.warmup_fraction={fraction}"])
    assert config.trainer.warmup_steps == expected


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*can't be read"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_a_resolved_configuration_can_be_read_again(minimal: Path, tmp_path: Path) -> None:
    config = load_config(
        minimal,
        [
            'data.instruction="Say \\"so\\" — and\\\\no more\\u007f."',
            'rollout.engine_options={"a b" = [1, 2], c = true}',
        ],
    )
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "resolved.toml") == config
    assert "min_pixels" not in tomllib.loads(to_toml(config))["data"]


# -- variants ----------------------------------------------------------------------------------------------------------


ROLLOUTS = {"temperature": 1.0, "rollout_deviation_floor": 0.0}
TOKENS = {"high_fraction": 0.2, "high_weight": 0.5}


@pytest.mark.parametrize(
    ("overrides", "objective", "keywords"),
    [
        ([], VaOpd(), {"variant": "va_opd", **ROLLOUTS, **TOKENS}),
        (["variant=standard"], StandardOpd(), {"variant": "standard"}),
        (
            ["variant=rollout_weights", "temperature=2.0", "rollout_deviation_floor=0.02"],
            RolloutWeightsOnly(temperature=2.0, rollout_deviation_floor=0.02),
            {"variant": "rollout_weights", "temperature": 2.0, "rollout_deviation_floor": 0.02},
        ),
        (
            ["variant=token_groups", "high_weight=0.7", "token_score=view_divergence"],
            TokenGroupsOnly(high_weight=0.7, token_score="view_divergence"),
            {"variant": "token_groups", "high_fraction": 0.2, "high_weight": 0.7},
        ),
        (
            ["token_score=expected"],
            VaOpd(token_score="expected"),
            {"variant": "va_opd", **ROLLOUTS, **TOKENS},
        ),
        (
            ["variant=masked", "mask=bottom", "mask_ties=random"],
            MaskedOpd(mask="bottom", mask_ties="random"),
            {"variant": "masked", "mask": "bottom", "mask_fraction": 0.1, "mask_ties": "random"},
        ),
    ],
)
def test_an_objective_has_the_fields_of_its_variant_alone(
    minimal: Path, overrides: list[str], objective: Section, keywords: dict[str, object]
) -> None:
    overrides = ["teacher.payload=hidden_pair", *(f"objective.{override}" for override in overrides)]
    config = load_config(minimal, overrides)
    assert config.objective == objective
    assert config.objective.as_keywords() == keywords


def test_payload_degradation_and_engine_are_variants_too(minimal: Path) -> None:
    overrides = ["teacher.payload=top_k", "teacher.top_k=8", "degradation.kind=black", "rollout.engine=transformers"]
    config = load_config(minimal, overrides)
    assert config.teacher == TopKTeacher(model="models/teacher", top_k=8)
    assert config.teacher.make_payload_keywords() == {"payload": "top_k", "top_k": 8}
    assert config.degradation == PlainDegradation(kind="black")
    assert config.rollout == TransformersRollout()
    config = load_config(minimal, ["teacher.payload=sampled", "teacher.sampled_estimator=k1"])
    assert config.teacher == SampledTeacher(model="models/teacher", sampled_estimator="k1")
    assert config.teacher.make_payload_keywords() == {"payload": "sampled"}
    assert config.teacher.make_loss_keywords() == {"estimator": "k1"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"objective": {"mask_fraction": 0.3}},
            r'objective\.mask_fraction: no such key with variant = "va_opd"; it belongs to variant = "masked": set',
        ),
        (
            {"objective": {"variant": "standard", "high_weight": 0.3}},
            r'with variant = "standard"; it belongs to variant = "va_opd" or variant = "token_groups"',
        ),
        ({"objective": {"variant": "masked", "temperature": 2}}, r'it belongs to variant = "va_opd" or .*weights"'),
        ({"degradation": {"kind": "black", "strength": 0.3}}, r'it belongs to kind = "pixelate" or kind = "blur"'),
        ({"rollout": {"engine": "transformers", "engine_options": {}}}, r'it belongs to engine = "vllm"'),
        ({"teacher": {"model": "m", "top_k": 3}}, r'with payload = "hidden"; it belongs to payload = "top_k"'),
        ({"teacher": {"model": "m", "payload": "top_k", "sampled_estimator": "k1"}}, r'it belongs to payload = "sampl'),
        (
            {"objective": {"variant": "masked", "masks": 1}},
            r"masks: no such key; did you mean mask\? Known here: variant",
        ),
        ({"objective": {"variant": "masked", "mask": 1}}, r"objective\.mask: should be 'top'.*, got 1"),
        ({"objective": 3}, r"objective: should be a table, .*, got 3"),
        (
            {"objective": {"token_score": "expected"}},
            r'teacher\.payload = "hidden" doesn\'t carry them; set teacher\.payload = "hidden_pair", or',
        ),
    ],
)
def test_a_variant_refuses_the_fields_of_another_one(section: dict[str, object], message: str) -> None:
    values = tomllib.loads(MINIMAL) | section
    with pytest.raises(ConfigError, match=message):
        validate(Config, values, origin="run.toml")


def test_an_override_that_chooses_another_variant_leaves_the_file_s_one_behind(minimal: Path) -> None:
    """Otherwise `--set rollout.engine=transformers` would ask for a change of every file with engine_options."""
    minimal.write_text(
        MINIMAL.replace("[teacher]\n", '[teacher]\npayload = "top_k"\ntop_k = 8\n')
        + "[rollout]\ntop_p = 0.9\nengine_options = { max_model_len = 512 }\n[objective]\ntemperature = 2.0\n"
    )
    overrides = ["rollout.engine=transformers", "objective.variant=rollout_weights", "teacher.payload=hidden"]
    config = load_config(minimal, overrides)
    assert config.rollout == TransformersRollout(top_p=0.9)
    assert config.objective == RolloutWeightsOnly(temperature=2.0)  # which this variant knows too
    assert config.teacher == HiddenTeacher(model="models/teacher")


class Whole(Section):
    """Not sharded."""

    kind: Literal["none"] = "none"


class Sharded(Section):
    """Sharded over ranks."""

    kind: Literal["fsdp"] = "fsdp"
    ranks: int = 2


class Optimizer(Section):
    sharding: Annotated[Whole | Sharded, Discriminator("kind"), default_tag("kind", "none")] = Whole()


class Nested(Section):
    optimizer: Optimizer = Optimizer()


def test_a_section_with_variants_may_stand_in_another_section() -> None:
    values = {"optimizer": {"sharding": {"kind": "fsdp", "ranks": 4}}}
    assert validate(Nested, values, origin="x").optimizer.sharding == Sharded(ranks=4)
    with pytest.raises(ConfigError, match=r'optimizer\.sharding\.ranks: no such key with kind = "none"'):
        validate(Nested, {"optimizer": {"sharding": {"ranks": 4}}}, origin="x")
    apply_overrides(Nested, values, ["optimizer.sharding.kind=none"])
    assert values == {"optimizer": {"sharding": {"kind": "none"}}}
    apply_overrides(Nested, values, ["optimizer.sharding={ kind = 'fsdp', ranks = 8 }"])
    assert values == {"optimizer": {"sharding": {"kind": "fsdp", "ranks": 8}}}
