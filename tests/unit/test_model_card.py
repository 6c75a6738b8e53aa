"""The model card of what a run leaves: all that is needed to publish it, and nothing about this machine."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import vaopd
from tests.support.runs import make_run
from vaopd.run.model_card import upload_hint, write_model_card

MODELS = """
[student]
model = "Qwen/Qwen3-VL-2B-Instruct"
[teacher]
model = "/somewhere/else/Qwen3-VL-8B-Instruct"
address = "secret-host:50051"
[data]
source = "hiyouga/geometry3k"
[queue]
url = "redis://user:password@secret-host:6379/0"
"""


LORA = """
[student.lora]
rank = 8
alpha = 32
"""


def write_card(folder: Path, *, step: int, base: str = "", more: str = "") -> str:
    run = make_run(folder / "va-8b", accuracies=(0.3, 0.5, 0.6), judged=True)
    (run / "config.toml").write_text((run / "config.toml").read_text() + MODELS + more)
    (folder / "base").mkdir()
    (folder / "base" / "README.md").write_text(base)
    model = run / "model"
    model.mkdir()
    write_model_card(run, model, step=step, base=folder / "base")
    return (model / "README.md").read_text()


def test_the_front_matter_is_the_hubs(tmp_path: Path) -> None:
    card = write_card(tmp_path, step=20, base="---\nlicense: apache-2.0\ntags: [a]\n---\n# Qwen\n")
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "Qwen/Qwen3-VL-2B-Instruct",
        "datasets": ["hiyouga/geometry3k"],
        "license": "apache-2.0",
        "tags": ["on-policy-distillation", "vaopd"],
    }


def test_a_base_model_without_a_licence_leaves_it_to_the_publisher(tmp_path: Path) -> None:
    card = write_card(tmp_path, step=20, base="# No front matter\n\nlicense: none\n---\n---\n")
    assert "license:" not in card.split("---\n", 2)[1]
    assert "complete `license` at the top" in card


def test_it_says_what_was_trained_and_how_well_it_did_by_which_judge(tmp_path: Path) -> None:
    card = write_card(tmp_path, step=20)
    for line in (
        "| base model | Qwen/Qwen3-VL-2B-Instruct |",
        "| teacher | Qwen3-VL-8B-Instruct |",
        "| training data | hiyouga/geometry3k, split train |",
        "| optimizer steps | 20 of 20 |",
        "| held-out accuracy of the base model | 30.0 % ± 3.0 (avg@1, 300 problems; judge 1, by hand) |",
        "| held-out accuracy | 60.0 % ± 3.0 (avg@1, 300 problems; judge 3, by hand) |",
    ):
        assert line in card.splitlines()
    assert f"with vaopd {vaopd.__version__}." in card


def test_the_accuracy_is_that_of_its_own_step_or_none(tmp_path: Path) -> None:
    assert "| held-out accuracy | 50.0 % ± 3.0" in write_card(tmp_path / "best", step=10)
    assert "| held-out accuracy | not measured at this step |" in write_card(tmp_path / "other", step=15)


def test_it_holds_nothing_about_this_machine(tmp_path: Path) -> None:
    card = write_card(tmp_path, step=20)
    for private in ("secret-host", "password", "/somewhere", str(tmp_path)):
        assert private not in card


def test_the_hint_names_the_run() -> None:
    assert upload_hint(Path("runs/va-8b/model")) == "to publish it: vaopd push runs/va-8b YOUR_NAME/va-8b --which model"


def test_a_student_of_adapters_is_called_one_and_its_recipe_is_toml(tmp_path: Path) -> None:
    card = write_card(tmp_path, step=20, more=LORA)
    assert "| trained | LoRA, rank 8, alpha 32, merged into the base model's weights |" in card
    recipe = tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])
    assert recipe["student"] == {"model": "Qwen/Qwen3-VL-2B-Instruct", "lora": {"rank": 8, "alpha": 32}}
