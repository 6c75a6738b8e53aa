"""Loading prompts: both real schemas, several images and none, and bad records named by index and field."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vaopd.data import tables
from vaopd.data.loaders import load_prompts
from vaopd.errors import InvalidInput, NotFound
from vaopd.types import EncodedImage, ImagePart, TextPart


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


RED, BLUE = png(200), png(1)
SHA_RED, SHA_BLUE = EncodedImage(data=RED).sha256, EncodedImage(data=BLUE).sha256
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
GEOMETRY3K = pa.schema([("images", IMAGES), ("problem", pa.string()), ("answer", pa.string())])
VIRL39K = pa.schema(
    [("question", pa.string()), ("answer", pa.string()), ("image", pa.list_(pa.string())), ("qid", pa.string())]
)


def geometry3k(folder: Path, *records: tuple[str | None, str | None, list[bytes]], name: str = "train.parquet") -> str:
    rows = [
        {"problem": problem, "answer": answer, "images": [{"bytes": data, "path": None} for data in images]}
        for problem, answer, images in records
    ]
    return parquet(folder, rows, GEOMETRY3K, name)


def parquet(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema, name: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name)
    return str(folder)


def test_geometry3k(tmp_path: Path) -> None:
    source = geometry3k(tmp_path, ("<image>Find x.", "3", [RED]), name="data/train-00000-of-00001.parquet")

    prompts = load_prompts(source, split="train")

    assert len(prompts) == 1
    assert prompts[0].prompt_id == "train-0"
    assert prompts[0].answer == "3"
    assert prompts[0].images == (EncodedImage(data=RED),)
    assert prompts[0].messages[0].role == "user"
    assert prompts[0].messages[0].content == (ImagePart(sha256=SHA_RED), TextPart(text="Find x."))


def test_virl39k_with_images_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(RED)
    row = {"question": "<image>Which?", "answer": r"\boxed{D}", "image": ["images/a.png"], "qid": "q-17"}
    source = parquet(tmp_path, [row], VIRL39K, "39Krelease.parquet")

    prompt = load_prompts(source, split="train")[0]

    assert prompt.prompt_id == "q-17"
    assert prompt.answer == r"\boxed{D}"
    assert prompt.images == (EncodedImage(data=RED),)


def test_markers_say_where_each_image_stands(tmp_path: Path) -> None:
    source = geometry3k(tmp_path, ("Is <image> redder than <image>?", "yes", [RED, BLUE]))

    assert load_prompts(source, split="train")[0].messages[0].content == (
        TextPart(text="Is "),
        ImagePart(sha256=SHA_RED),
        TextPart(text=" redder than "),
        ImagePart(sha256=SHA_BLUE),
        TextPart(text="?"),
    )


def test_images_without_markers_come_first(tmp_path: Path) -> None:
    source = geometry3k(tmp_path, ("Which is redder?", "the first", [RED, BLUE]))

    assert load_prompts(source, split="train")[0].messages[0].content == (
        ImagePart(sha256=SHA_RED),
        ImagePart(sha256=SHA_BLUE),
        TextPart(text="Which is redder?"),
    )


def test_a_prompt_may_have_no_image(tmp_path: Path) -> None:
    prompt = load_prompts(geometry3k(tmp_path, ("What is 1+1?", "2", [])), split="train")[0]

    assert prompt.images == ()
    assert prompt.messages[0].content == (TextPart(text="What is 1+1?"),)


def test_the_same_image_twice_is_carried_once(tmp_path: Path) -> None:
    prompt = load_prompts(geometry3k(tmp_path, ("<image> or <image>?", "both", [RED, RED])), split="train")[0]

    assert prompt.images == (EncodedImage(data=RED),)
    assert [part for part in prompt.messages[0].content if isinstance(part, ImagePart)] == [
        ImagePart(sha256=SHA_RED)
    ] * 2


def test_an_instruction_goes_on_a_line_of_its_own(tmp_path: Path) -> None:
    source = geometry3k(tmp_path, ("<image>Find x.", "3", [RED]))

    prompt = load_prompts(source, split="train", instruction=r"Put it in \boxed{}.")[0]

    assert prompt.messages[0].content[-1] == TextPart(text="Find x.\nPut it in \\boxed{}.")


def test_shuffling_is_seeded_and_keeps_the_ids(tmp_path: Path) -> None:
    source = geometry3k(tmp_path, *[(f"What is {i}?", str(i), []) for i in range(20)])

    first, again, other = (load_prompts(source, split="train", shuffle_seed=seed, limit=5) for seed in (1, 1, 2))

    assert [p.prompt_id for p in first] == [p.prompt_id for p in again] != [p.prompt_id for p in other]
    assert len(first) == 5
    assert all(p.prompt_id == f"train-{p.answer}" for p in first)
    assert [p.prompt_id for p in first[1:3]] == [first[1].prompt_id, first[2].prompt_id]


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for shard in range(2):
        geometry3k(tmp_path, (f"Shard {shard}?", str(shard), []), name=f"train-0000{shard}-of-00002.parquet")

    assert [prompt.answer for prompt in load_prompts(str(tmp_path), split="train")] == ["0", "1"]


def test_a_large_set_is_memory_mapped_with_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = geometry3k(tmp_path / "set", *[(f"<image>Is it {i}?", str(i), [RED]) for i in range(5)])
    in_memory = list(load_prompts(source, split="train"))

    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0)
    mapped = load_prompts(source, split="train", cache_dir=tmp_path / "cache")

    assert list(mapped) == in_memory
    assert list((tmp_path / "cache").rglob("*.arrow"))


BAD_TEXT_OR_COUNT = [
    ((None, "3", [RED]), "'problem': the text is missing or empty"),
    (("<image>", "3", [RED]), "'problem': the text is missing or empty"),
    (("<image>Find x.", None, [RED]), "'answer': the answer is missing or empty"),
    (("<image>Find x.", " ", [RED]), "'answer': the answer is missing or empty"),
    (("<image><image>Find x.", "3", [RED]), "'problem': the text has 2 <image> markers and the record 1 images"),
    (("<image>Find x.", "3", []), "'problem': the text has 1 <image> markers and the record 0 images"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_TEXT_OR_COUNT)
def test_a_bad_record_is_named_at_once(tmp_path: Path, bad: Any, message: str) -> None:
    source = geometry3k(tmp_path, ("What is 1+1?", "2", []), bad)

    with pytest.raises(InvalidInput) as caught:
        load_prompts(source, split="train")

    assert f"split 'train', record 1, field {message}" in str(caught.value)


def test_bad_records_can_be_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = geometry3k(tmp_path, ("One?", "1", []), ("<image>Two?", "2", []), ("Three?", "3", []))

    prompts = load_prompts(source, split="train", bad_records="skip")

    assert [prompt.prompt_id for prompt in prompts] == ["train-0", "train-2"]
    assert "skipping 1 of 3 records" in caplog.text


@pytest.mark.parametrize("data", [b"", b"GIF89a...", b"not an image"])
def test_bytes_that_are_no_image_are_named_when_taken(tmp_path: Path, data: bytes) -> None:
    prompts = load_prompts(geometry3k(tmp_path, ("<image>Find x.", "3", [data])), split="train")

    with pytest.raises(InvalidInput, match=r"record 0, field 'images\[0\]': not a PNG, JPEG or WEBP"):
        prompts[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("images/missing.png", "there is no file"),
        ("../secret.png", "leads out of"),
        ("/etc/hostname", "leads out of"),
        ("", "neither image bytes nor a path"),
        ("images/a\nb.png", r"there is no file '.*a\\nb\.png'"),
        ("https://example.com/a.png", "is a URL, and none is fetched"),
        ("loop.png", "is no path"),
        ("data:image/png;base64,iVBOR", "base64 that ends early"),
    ],
)
def test_a_path_must_name_a_file_inside_the_folder(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "loop.png").symlink_to("loop.png")
    row = {"question": "<image>Which?", "answer": "A", "image": [path], "qid": "q"}
    prompts = load_prompts(parquet(tmp_path / "set", [row], VIRL39K, "train.parquet"), split="train")

    with pytest.raises(InvalidInput, match=message):
        prompts[0]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    source = geometry3k(tmp_path, ("One?", "1", []))

    with pytest.raises(NotFound, match=r"no Parquet file of split 'test'.*train.parquet"):
        load_prompts(source, split="test")
    with pytest.raises(NotFound, match="no such folder, and it is not a hub id"):
        load_prompts("/no/such/folder", split="train")
    with pytest.raises(NotFound, match="where the command runs, and it is not a hub id"):
        load_prompts("tests/misspelt", split="train")  # as tests/ is a folder here
    with pytest.raises(NotFound, match="nobody/nothing"):
        load_prompts("nobody/nothing", split="train", cache_dir=tmp_path)  # the tests run offline


@pytest.mark.parametrize(
    ("columns", "key"), [(["prompt"], "text"), (["problem", "answer"], "images"), (["messages", "images"], "answer")]
)
def test_missing_columns_are_named_with_the_key_to_set(tmp_path: Path, columns: list[str], key: str) -> None:
    schema = pa.schema([(name, pa.string()) for name in columns])
    source = parquet(tmp_path, [dict.fromkeys(columns, "One?")], schema, "train.parquet")

    with pytest.raises(InvalidInput, match=f"columns {', '.join(columns)}; needed: problem .*columns.{key}=NAME"):
        load_prompts(source, split="train")


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="limit must be at least 1"):
        load_prompts(str(tmp_path), split="train", limit=0)
