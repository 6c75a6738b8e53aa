"""Policy snapshots: what a rollout worker finds in the folder, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.waiting import wait_until
from vaopd.errors import InvalidInput, Mismatch, NotFound
from vaopd.files import durable
from vaopd.files.durable import atomic_folder
from vaopd.run import snapshots
from vaopd.run.snapshots import (
    describe_model,
    keep_snapshot,
    list_weights,
    prune_snapshots,
    publish_snapshot,
    verify_snapshot,
)
from vaopd.vlm.torchvision_compat import ensure_torchvision


def a_model(*, tied: bool) -> torch.nn.Module:
    """The real class, as small as it gets."""
    ensure_torchvision()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10_000.0},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "depth": 1,
            "num_heads": 1,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        tie_word_embeddings=tied,
    )
    return Qwen3VLForConditionalGeneration(config)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A model folder as other than weights: a snapshot takes the rest from it."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"the student's first weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "README.md").write_text("not for the model")
    return folder


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((2, 3), value)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("tied", "file_bytes"), [(True, 10_000), (False, 10_000), (True, 2**28)])
def test_a_snapshot_holds_what_save_pretrained_writes(
    tmp_path: Path, tied: bool, file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "FILE_BYTES", file_bytes)
    model = a_model(tied=tied)
    model.save_pretrained(tmp_path / "student")
    policy = publish_snapshot(tmp_path / "run", 7, model.state_dict(), model_files_from=tmp_path / "student")

    expected = load_file(tmp_path / "student" / "model.safetensors")
    files = list_weights(Path(policy.path))
    parts = [load_file(file) for file in files]
    assert (len(files) > 3) is (file_bytes == 10_000)
    assert all(sum(tensor.nbytes for tensor in part.values()) <= file_bytes or len(part) == 1 for part in parts)
    verify_snapshot(policy)
    written = {name: tensor for part in parts for name, tensor in part.items()}
    assert written.keys() == expected.keys()
    assert ("lm_head.weight" in written) is not tied
    assert all(torch.equal(written[name], expected[name]) for name in expected)

    loaded = type(model).from_pretrained(policy.path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_model_in_several_files_is_described_by_one_digest(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no safetensors files"):
        describe_model(tmp_path)
    contents = b"the first", b"the second"
    for number, content in enumerate(contents, 1):
        (tmp_path / f"model-{number:05d}-of-00002.safetensors").write_bytes(content)
    of_pieces = b"".join(hashlib.sha256(content).digest() for content in contents)
    assert describe_model(tmp_path).sha256 == hashlib.sha256(of_pieces).hexdigest()


def test_a_gathered_state_holds_the_tied_head_twice(tmp_path: Path, student: Path) -> None:
    gathered = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    policy = publish_snapshot(tmp_path, 0, gathered, model_files_from=student)
    assert list(load_file(Path(policy.path) / "model.safetensors")) == ["model.embed_tokens.weight"]


def test_an_undeclared_tie_is_refused(tmp_path: Path, student: Path) -> None:
    shared = torch.ones(4, 2)
    with pytest.raises(InvalidInput, match=r"b\.weight and a\.weight share storage.*tie_word_embeddings"):
        publish_snapshot(tmp_path, 0, {"a.weight": shared, "b.weight": shared}, model_files_from=student)
    assert not (tmp_path / "policy" / "v000000").exists()


def test_a_snapshot_is_a_model_folder_with_a_known_digest(tmp_path: Path, student: Path) -> None:
    policy = publish_snapshot(tmp_path / "run", 42, state(), model_files_from=student)
    folder = tmp_path / "run" / "policy" / "v000042"
    assert (policy.version, policy.path) == (42, str(folder))
    assert names_in(folder) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    content = (folder / "model.safetensors").read_bytes()  # less than a piece: the digest of the one piece's digest
    assert policy.sha256 == hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
    verify_snapshot(policy)


def test_a_snapshot_has_own_copies_that_everybody_may_read(tmp_path: Path, student: Path) -> None:
    """Under the umask 022: an inference server of another account loads it; an editor changes this copy alone."""
    before = os.umask(0o022)
    try:
        policy = publish_snapshot(tmp_path / "run", 0, state(), model_files_from=student)
        keep_snapshot(policy, tmp_path / "run" / "best")
    finally:
        os.umask(before)
    for folder in (Path(policy.path), tmp_path / "run" / "best"):
        for file in folder.iterdir():
            assert (file.name, oct(file.stat().st_mode & 0o777), file.stat().st_nlink) == (file.name, "0o644", 1)


def test_the_configuration_names_the_precision_of_the_weights_beside_it(tmp_path: Path, student: Path) -> None:
    """Whatever precision the student's own configuration names, for itself and for its parts."""
    config = {"dtype": "float32", "text_config": {"dtype": "float32", "layers": 2}, "vision_config": {"depth": 1}}
    (student / "config.json").write_text(json.dumps(config))
    tensors = {"layer": torch.zeros(8, dtype=torch.bfloat16), "scale": torch.zeros(1), "ids": torch.zeros(99).int()}
    policy = publish_snapshot(tmp_path / "run", 0, tensors, model_files_from=student)
    assert json.loads((Path(policy.path) / "config.json").read_text()) == {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "layers": 2},
        "vision_config": {"depth": 1},
    }
    assert json.loads((student / "config.json").read_text()) == config


def test_a_link_from_a_hub_cache_becomes_a_file(tmp_path: Path, student: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (student / "vocab.json").symlink_to(tmp_path / "blob")
    policy = publish_snapshot(tmp_path, 0, state(), model_files_from=student)
    assert not (Path(policy.path) / "vocab.json").is_symlink()
    assert (Path(policy.path) / "vocab.json").read_text() == "{}"


def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"has no config\.json"):
        publish_snapshot(tmp_path, 0, state(), model_files_from=tmp_path)


def test_publishing_a_version_again_replaces_it(tmp_path: Path, student: Path) -> None:
    first = publish_snapshot(tmp_path, 3, state(1.0), model_files_from=student)
    assert publish_snapshot(tmp_path, 3, state(1.0), model_files_from=student) == first
    second = publish_snapshot(tmp_path, 3, state(2.0), model_files_from=student)
    verify_snapshot(second)
    with pytest.raises(Mismatch, match=r"policy version 3: .* take the latest version"):
        verify_snapshot(first)
    assert names_in(tmp_path / "policy") == ["v000003"]


def test_a_snapshot_is_there_before_the_disk_has_it(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, may_end = threading.Event(), threading.Event()

    def take_long(handle: int) -> None:
        asked.set()
        assert may_end.wait(180)

    monkeypatch.setattr(durable.os, "fsync", take_long)
    verify_snapshot(publish_snapshot(tmp_path, 1, state(), model_files_from=student))
    assert asked.wait(180)
    prune_snapshots(tmp_path, keep=1, current=0)
    assert names_in(tmp_path / "policy") == []
    may_end.set()
    wait_until("the thread has ended", lambda: all(t.name != "vaopd-fsync" for t in threading.enumerate()))


def test_a_snapshot_that_is_not_there_says_why_that_may_be(tmp_path: Path, student: Path) -> None:
    policy = publish_snapshot(tmp_path, 1, state(), model_files_from=student)
    publish_snapshot(tmp_path, 2, state(), model_files_from=student)
    prune_snapshots(tmp_path, keep=1)
    with pytest.raises(NotFound, match=r"it was pruned .* or the trainer's folder is not mounted"):
        verify_snapshot(policy)


def test_pruning_keeps_the_newest(tmp_path: Path, student: Path) -> None:
    for version in (8, 9, 10, 11):
        publish_snapshot(tmp_path, version, state(), model_files_from=student)
    (tmp_path / "policy" / ".v000012.tmp-half").mkdir()
    assert prune_snapshots(tmp_path, keep=2) == [8, 9]
    assert prune_snapshots(tmp_path, keep=2) == []
    assert names_in(tmp_path / "policy") == ["v000010", "v000011"]
    with pytest.raises(InvalidInput, match="keep at least 1"):
        prune_snapshots(tmp_path, keep=0)


def test_pruning_after_a_resume_drops_the_versions_beyond(tmp_path: Path, student: Path) -> None:
    for version in range(6):
        publish_snapshot(tmp_path, version, state(), model_files_from=student)
    assert prune_snapshots(tmp_path, keep=2, current=3) == [0, 1, 4, 5]


def test_pruning_where_nothing_was_published(tmp_path: Path) -> None:
    assert prune_snapshots(tmp_path, keep=1) == []


def test_an_atomic_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with atomic_folder(target) as folder:
        (folder / "step").write_text("1")

    def fail_half_way() -> None:
        with atomic_folder(target) as folder:
            (folder / "step").write_text("2")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fail_half_way()
    assert (target / "step").read_text() == "1"
    assert names_in(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "without renameat2"])
def test_an_atomic_folder_replaces_the_whole_folder(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # as on NFS
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    target = tmp_path / "checkpoint"
    for step in ("1", "2"):
        with atomic_folder(target) as folder:
            (folder / f"only-in-{step}").write_text(step)
            (folder / "sub").mkdir()
            (folder / "sub" / "step").write_text(step)
            if step == "2":
                assert (target / "only-in-1").exists()  # to the last
    assert names_in(target) == ["only-in-2", "sub"]
    assert (target / "sub" / "step").read_text() == "2"
    assert names_in(tmp_path) == ["checkpoint"]
