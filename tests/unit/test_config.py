"""The configuration: one TOML file; what is wrong in it is named with the key and the remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pydantic
import pytest

from vaopd.config import Config, Section, load_config, to_toml
from vaopd.errors import ConfigError

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


def count_fields(model: type[pydantic.BaseModel]) -> int:
    kinds = [field.annotation for field in model.model_fields.values()]
    return sum(count_fields(kind) if isinstance(kind, type) and issubclass(kind, Section) else 1 for kind in kinds)


def test_the_configuration_stays_small() -> None:
    assert count_fields(Config) < 60


def test_every_field_is_documented() -> None:
    """The docstring under a field is its description."""
    sections = [field.annotation for field in Config.model_fields.values()]
    assert [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description
    ] == []


def test_what_is_left_out_has_the_paper_s_value(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.trainer.learning_rate == 1e-6
    assert config.trainer.betas == (0.9, 0.95)
    assert (config.degradation.kind, config.degradation.strength) == ("pixelate", 0.1)
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
    ],
)
def test_set_overrides_one_field(minimal: Path, override: str, key: tuple[str, str], value: object) -> None:
    section, name = key
    assert getattr(getattr(load_config(minimal, [override]), section), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepz=3", r"trainer\.stepz: no such key; known here: steps, prompts_per_step"),
        ("trainer.steps=0", r"trainer\.steps: .*greater than or equal to 1, got 0"),
        ("trainer.steps=many", r"trainer\.steps: .*valid integer.*, got 'many'"),
        ("objective.variant=best", r"objective\.variant: .*'va_opd', 'standard'.*got 'best'"),
        ("run.name=../elsewhere", r"run\.name: .*pattern"),
        ("teacher.address=localhost", r"teacher\.address: .*pattern"),
        ("teacher.address=one:50051,two", r"teacher\.address: .*pattern"),
        ("teacher.payload=none", r"use hidden, top_k or sampled"),
        ("trainer.processes=3", r"prompts_per_step = 16 must be a multiple of trainer\.processes = 3"),
        ("steps=3", r"not of the form section\.key=value"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_remedy(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [override])


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
