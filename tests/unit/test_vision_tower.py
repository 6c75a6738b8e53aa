"""The vision tower over several images at once: what a GPU's shortcuts compute is what transformers computes."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.families import FAMILIES, family_vlm, plain_model
from tests.support.kernels import reference_kernel
from tests.support.teacher import drawing
from vaopd.vlm.families import PreparedImage, vision_tower
from vaopd.vlm.families.qwen_vl import Qwen25VL
from vaopd.vlm.fused_norms import is_rms_norm, normalise
from vaopd.vlm.model import Vlm
from vaopd.vlm.transfer import upload_rows

pytestmark = pytest.mark.numeric
QWEN = ("qwen3_vl", "qwen2_5_vl")
SIZES = ((64, 64), (128, 64), (96, 160))


def images_of(vlm: Vlm) -> list[PreparedImage]:
    return [vlm.prepare_image(drawing(seed, size)) for seed, size in enumerate(SIZES)]


def plain_features(family: str, images: list[PreparedImage], dtype: str) -> Any:
    plain = plain_model(family, dtype=dtype)
    return plain.model.get_image_features(
        torch.cat([image.pixel_values for image in images]).to(plain.dtype),
        torch.tensor([image.grid for image in images]),
        return_dict=True,
    )


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_on_a_cpu_the_features_are_transformers_own_to_the_bit(family: str) -> None:
    vlm = family_vlm(family)
    images = images_of(vlm)
    expected = plain_features(family, images, "float32")
    for (embeddings, *_), own in zip(vlm.encode_images(images), expected.pooler_output, strict=True):
        assert torch.equal(embeddings, own)


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_one_call_for_all_images_of_a_layer_gives_the_same_features(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention by the reference kernel, indices computed beforehand: the way of a GPU."""
    calls: list[int] = []

    def kernel(*args: Any, **options: Any) -> Tensor:
        calls.append(len(args[3]) - 1)
        return reference_kernel(*args, **options)

    def encode(model: Any, images: list[PreparedImage]) -> Any:
        grids = torch.tensor([image.grid for image in images])
        pixels = torch.cat([image.pixel_values for image in images]).double()
        precomputed = vlm.family._precompute(vlm.family.vision_tower(model), grids)
        return model.model.get_image_features(pixels, grids, return_dict=True, **precomputed)

    monkeypatch.setattr(vision_tower, "choose_kernel", lambda *_: kernel)
    vlm = family_vlm(family, dtype="float64")
    assert isinstance(vlm.family, Qwen25VL)
    images = images_of(vlm)
    expected, found = plain_features(family, images, "float64"), encode(vlm.model, images)
    for mine, theirs in zip(found.pooler_output, expected.pooler_output, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert len(calls) == len(vlm.family.vision_tower(vlm.model).blocks)  # type: ignore[arg-type]
    assert len(images) in calls


@pytest.mark.parametrize("align_corners", [True, False])
def test_learned_positions_are_resampled_as_transformers_does(align_corners: bool) -> None:
    """To the bit, for grids that are smaller and larger than the 48 × 48 learned positions, and for one block."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    tower = SimpleNamespace(
        device=torch.device("cpu"),
        num_grid_per_side=48,
        interpolation_mode="bilinear",
        interpolation_align_corners=align_corners,
        config=SimpleNamespace(spatial_merge_size=2),
    )
    grids = torch.tensor([[1, 2, 2], [1, 36, 20], [2, 4, 6], [1, 50, 128]])
    found = vision_tower.compute_interpolation(tower, grids)
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids, num_grid_per_side=48, mode="bilinear", align_corners=align_corners, spatial_merge_size=2
    )
    assert torch.equal(found["interp_indices"], indices)
    assert torch.equal(found["interp_weights"], weights)


@torch.no_grad()
def test_deepstack_features_of_all_images_in_one_tensor_are_split() -> None:
    """transformers before 5.18 returns each layer's features of all images in one tensor; later ones image by image."""
    vlm = family_vlm("qwen3_vl")
    images = images_of(vlm)
    expected = vlm.encode_images(images)
    own = vlm.model.model.get_image_features

    def old(*args: Any, **options: Any) -> Any:
        features = own(*args, **options)
        layers = [layer if isinstance(layer, Tensor) else torch.cat(layer) for layer in features.deepstack_features]
        features.deepstack_features = layers
        return features

    vlm.model.model.get_image_features = old
    try:
        found = vlm.encode_images(images)
    finally:
        del vlm.model.model.get_image_features
    assert [len(parts) for parts in found] == [2, 2, 2]  # embeddings and one deepstack layer
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [len(parts[1]) for parts in found] == [image.num_tokens for image in images]


@torch.no_grad()
def test_deepstack_features_are_added_at_rows_as_by_a_mask() -> None:
    text_model = family_vlm("qwen3_vl").model.model.language_model
    hidden, features = torch.randn(1, 9, 6), torch.randn(3, 6)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, [2, 3, 7]] = True
    by_mask = text_model._deepstack_process(hidden, mask, features)
    assert torch.equal(text_model._deepstack_process(hidden, torch.tensor([2, 3, 7]), features), by_mask)
    assert not torch.equal(by_mask, hidden)


@torch.no_grad()
def test_patches_are_embedded_by_one_product_as_by_the_convolution() -> None:
    convolution = family_vlm("qwen3_vl", dtype="float64").model.model.visual.patch_embed.proj
    shape = (5, *convolution.weight.shape[1:])
    patches = torch.randn(shape, dtype=torch.float64)
    expected = convolution(patches).flatten(1)
    torch.testing.assert_close(vision_tower.embed_patches(convolution, patches.flatten(1)), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_norms_by_one_kernel_are_transformers_own(family: str) -> None:
    model = family_vlm(family, dtype="float64").model
    norms = [module for module in model.modules() if is_rms_norm(module)]
    assert len(norms) >= 2 * model.config.get_text_config().num_hidden_layers + 1
    for norm in norms:
        norm = copy.deepcopy(norm)
        norm.weight.copy_(torch.randn_like(norm.weight))
        values = torch.randn(3, 7, len(norm.weight), dtype=torch.float64)
        # transformers computes the norm in float32 whatever the precision, so the bound is float32's.
        torch.testing.assert_close(normalise(norm, values, norm.weight), norm(values), rtol=1e-6, atol=1e-6)


def test_a_copied_model_reads_its_own_weights() -> None:
    """A function that were bound to the first model's norm would read that one's."""
    model = family_vlm("qwen3_vl").model
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        forward = vars(module).get("forward")
        assert forward is None or forward.__self__ is module, name
    assert copied.model.language_model._deepstack_process.__self__ is copied.model.language_model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pixels_in_the_towers_precision_change_nothing(family: str) -> None:
    """A teacher in bfloat16 keeps its prepared images in it: transformers would round them there anyway."""
    vlm = family_vlm(family, dtype="bfloat16")
    rounded = vlm.prepare_image(drawing(1))
    wide = replace(rounded, pixel_values=family_vlm(family).prepare_image(drawing(1)).pixel_values)
    assert (rounded.pixel_values.dtype, wide.pixel_values.dtype) == (torch.bfloat16, torch.float32)
    for mine, theirs in zip(vlm.encode_images([rounded]), vlm.encode_images([wide]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_rows_go_up_one_after_the_other_in_the_wanted_precision() -> None:
    rows = [torch.arange(6.0).reshape(2, 3), torch.ones(1, 3)]
    joined = upload_rows(rows, torch.device("cpu"), torch.bfloat16)
    assert joined.dtype == torch.bfloat16
    assert joined.tolist() == [[0, 1, 2], [3, 4, 5], [1, 1, 1]]
