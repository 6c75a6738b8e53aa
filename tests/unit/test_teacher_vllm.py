"""What the vLLM teacher computes around vLLM: the prompts it reads, the tail of the top k, the weights' revision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import divergences, tolerance
from tests.support.families import FAMILIES, ask, family_vlm
from tests.support.models import save_untrained
from tests.support.teacher import drawing, encoded, question, write_config
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.config import load_config, load_service_config
from vaopd.errors import ConfigError, InvalidInput
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.vlm.revision import compute_folder_revision
from vaopd_teacher.engines.vllm_engine import collapse_images, load, split_top_k
from vaopd_teacher.engines.vllm_extension import log_probs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[(96, 96)], [(128, 64), (96, 96)], []], ids=["one image", "two images", "no image"])
def test_vllm_reads_one_placeholder_per_image(family: str, sizes: list[tuple[int, int]]) -> None:
    vlm = family_vlm(family)
    pictures = [drawing(seed, size) for seed, size in enumerate(sizes)]
    expected = vlm.render_ids(question("How long is it?", [encoded(picture) for picture in pictures]))
    assert collapse_images(vlm, ask(vlm, pictures)) == expected


def test_a_prompt_without_the_marks_around_an_image_is_refused() -> None:
    vlm = family_vlm("internvl")
    prompt = ask(vlm, [drawing(0)])
    (mark,) = set(vlm.processor.tokenizer.convert_tokens_to_ids(["<img>"]))
    bare = PreparedPrompt(token_ids=prompt.token_ids[prompt.token_ids != mark], images=prompt.images)
    with pytest.raises(InvalidInput, match="marks around"):
        collapse_images(vlm, bare)


V = 400


def told(logits: torch.Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and float32 log-probs of the n likeliest, as vLLM tells them; the last columns are padding."""
    top = log_probs(torch.cat((logits, torch.full((len(logits), 9), 99.0)), dim=1), V).topk(n)
    return top.indices.numpy(), top.values.numpy().astype(np.float64)


@pytest.mark.numeric
@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_the_tail_of_a_peaked_distribution_is_not_rounding(scale: float) -> None:
    """At 40 a tail is some e^-20 of the mass: of such a rest, 1 less a sum of usual log-probs would say nothing."""
    logits = scale * torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    ids, logprobs, tail = split_top_k(*told(logits, 32), 16)
    exact = torch.log_softmax(logits.double(), -1)
    expected = exact.topk(16)
    rest = exact.scatter(-1, expected.indices, -torch.inf).logsumexp(-1)
    assert np.array_equal(ids, expected.indices.numpy())
    assert_within(logprobs, expected.values, tolerance.log_softmax(logits).gather(-1, expected.indices))
    error = divergences.rest_error(exact, 16, 32)
    assert_within(tail, rest, error)
    # Below e^-14, what is beyond the 32 can be too small to be told from rounding.
    assert (error < torch.where(rest > -14, 0.06, 0.2)).all()
    assert_noticed(exact.scatter(-1, exact.topk(17).indices, -torch.inf).logsumexp(-1), rest, error)
    assert (rest < -14).any() == (scale > 1)


def test_the_whole_vocabulary_leaves_an_empty_tail() -> None:
    _, _, tail = split_top_k(*told(torch.randn(3, V), V), V)
    assert (tail == -np.inf).all()


def test_a_folders_revision_depends_on_weights_and_dtype_and_not_on_its_files(tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "model")
    first = compute_folder_revision(folder, dtype="float32")
    assert compute_folder_revision(folder, dtype="float32") == first
    assert compute_folder_revision(folder, dtype="bfloat16") != first
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    save_file({name: weights[name] for name in names[::2]}, folder / "model-1.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, folder / "model-2.safetensors")
    assert compute_folder_revision(folder, dtype="float32") == first
    weights[names[0]] += 1
    save_file({name: weights[name] for name in names[::2]}, folder / "model-1.safetensors")
    assert compute_folder_revision(folder, dtype="float32") != first


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no safetensors"):
        compute_folder_revision(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('backend = "vllm"\nprocesses = 2', "use options.tensor_parallel_size"),
        ("options = { max_model_len = 512 }", 'it belongs to backend = "vllm": set that'),
        ('backend = "tgi"', "engine.backend"),
    ],
)
def test_an_engine_that_can_not_be_is_refused_with_its_remedy(tmp_path: Path, written: str, says: str) -> None:
    (tmp_path / "service.toml").write_text(f"[teacher.engine]\n{written}\n")
    with pytest.raises(ConfigError, match=says):
        load_service_config(tmp_path / "service.toml")


@pytest.mark.parametrize("name", ["dtype", "max_logprobs", "worker_extension_cls"])
def test_what_the_teacher_sets_itself_is_no_option(tmp_path: Path, name: str) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError, match=f"engine.options.{name} is set by the teacher itself"):
        load(load_config(write_config(tmp_path)), {name: "x"})
