"""The forms of people's data sets: shards that differ, columns of many types, JSON Lines, folders of pictures."""

from __future__ import annotations

import base64
import datetime
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vaopd.data import tables
from vaopd.data.loaders import load_prompts
from vaopd.errors import InvalidInput, NotFound
from vaopd.files.hub import read_control_tokens
from vaopd.types import EncodedImage


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
A = {"problem": "<image>a", "answer": "1", "images": [{"bytes": RED, "path": None}]}
B = {"problem": "<image>b", "answer": "2", "images": [{"bytes": BLUE, "path": "b.png"}]}
LARGE = pa.table({"problem": pa.array(["a"], pa.large_string()), "answer": ["1"], "images": pa.nulls(1)})


def write(path: Path, table: pa.Table | list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), path)


def answers_and_images(source: Path, split: str = "train", **options: Any) -> list[tuple[str, list[bytes]]]:
    return [(p.answer, [image.data for image in p.images]) for p in load_prompts(str(source), split=split, **options)]


def load(folder: Path, *shards: pa.Table | list[dict[str, Any]]) -> list[tuple[str, list[bytes]]]:
    for index, shard in enumerate(shards):
        write(folder / f"train-{index}.parquet", shard)
    return answers_and_images(folder)


def column(values: list[Any], kind: pa.DataType, name: str = "images", text: str = "a") -> pa.Table:
    count = len(values)
    return pa.table({"problem": [text] * count, "answer": ["1"] * count, name: pa.array(values, kind)})


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        pytest.param([[A], [B]], [("1", [RED]), ("2", [BLUE])], id="paths in one"),
        pytest.param(
            [[{"problem": "a", "answer": "1", "images": []}], [B]], [("1", []), ("2", [BLUE])], id="no images in one"
        ),
        pytest.param([[{"problem": "a", "answer": "1"}], [B]], [("1", []), ("2", [BLUE])], id="no column in one"),
        pytest.param([[dict(reversed(A.items()))], [B]], [("1", [RED]), ("2", [BLUE])], id="column order"),
        pytest.param([[A | {"source": "x", "level": 1}], [B]], [("1", [RED]), ("2", [BLUE])], id="further columns"),
        pytest.param([[A | {"answer": 3}], [B]], [("3", [RED]), ("2", [BLUE])], id="numbers in one"),
        pytest.param([[A | {"images": [RED]}], [B]], [("1", [RED]), ("2", [BLUE])], id="bytes in one"),
        pytest.param([LARGE, [B]], [("1", []), ("2", [BLUE])], id="large string"),
        pytest.param([pa.Table.from_pylist([A]).slice(0, 0), [B]], [("2", [BLUE])], id="one is empty"),
    ],
)  # fmt: skip
def test_shards_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Any, expected: Any, mapped: bool
) -> None:
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0 if mapped else 2**28)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert load(tmp_path / "set", *shards) == expected


def test_a_record_of_a_later_shard_is_named_by_its_number_in_the_split(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"record 2, field 'answer': the answer is missing"):
        load(tmp_path, [A, A], [B | {"answer": None}])


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("list of bytes", column([[RED], None, []], pa.list_(pa.binary()))),
        ("list of large bytes", column([[RED], None, []], pa.large_list(pa.large_binary()))),
        ("fixed-size list", column([[{"bytes": RED, "path": None}], None, None], pa.list_(STRUCT, 1))),
        ("one struct", column([{"bytes": RED, "path": "x"}, None, None], STRUCT)),
        ("one struct, `image`", column([{"bytes": RED}, None, None], pa.struct([("bytes", pa.binary())]), "image")),
        ("bytes", column([RED, None, None], pa.binary())),
        ("path", column(["red.png", None, None], pa.string())),
        ("path of few values", column(["red.png", None, None], pa.dictionary(pa.int8(), pa.string()))),
        ("base64", column([base64.b64encode(RED).decode(), None, None], pa.string())),
        ("base64 in lines", column([[base64.encodebytes(RED).decode()], [], None], pa.list_(pa.string()))),
        ("data URI", column(["data:image/png;base64," + base64.b64encode(RED).decode(), None, None], pa.string())),
        ("paths", column([["red.png"], [], None], pa.list_(pa.string()))),
        ("a path beside no bytes", column([[{"bytes": b"", "path": "red.png"}], [], None], pa.list_(STRUCT))),
        ("a path alone", column([[{"path": "red.png"}], [], None], pa.list_(pa.struct([("path", pa.string())])))),
    ],
)
def test_an_image_column_may_have_many_types(tmp_path: Path, name: str, table: pa.Table) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    assert load(tmp_path, table) == [("1", [RED]), ("1", []), ("1", [])], name


def test_one_marker_for_one_image_that_is_no_list(tmp_path: Path) -> None:
    assert load(tmp_path, column([RED], pa.binary(), text="<image>a")) == [("1", [RED])]
    with pytest.raises(InvalidInput, match="the text has 2 <image> markers and the record 1 images"):
        load(tmp_path, column([RED], pa.binary(), text="<image><image>a"))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), 3),
        (pa.list_(pa.int64()), [3]),
        (pa.list_(pa.list_(pa.binary())), [[RED]]),
        (pa.struct([("url", pa.string())]), {"url": "x"}),
    ],
)  # fmt: skip
def test_a_column_that_holds_no_images_is_refused_at_once(tmp_path: Path, kind: pa.DataType, value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"train-0\.parquet: column 'images' is of type .*; give bytes, a path"):
        load(tmp_path, column([value], kind))


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000])
def test_a_name_that_no_file_can_have_is_a_bad_record(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidInput, match=r"record 0, field 'images\[0\]': .* is no path"):
        load(tmp_path, column([path], pa.string()))


def answer_of(folder: Path, values: list[Any], kind: pa.DataType | None = None) -> str:
    table = pa.table({"problem": ["a"], "answer": pa.array(values, kind), "images": pa.nulls(1)})
    return load(folder, table)[0][0]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (12, pa.int8(), "12"),
        (-3, pa.int64(), "-3"),
        (12.5, None, "12.5"),
        (0.1, pa.float32(), "0.1"),
        (np.float16(0.1), pa.float16(), "0.1"),
        (1e-7, None, "0.0000001"),
        (1e20, None, "100000000000000000000"),
        (Decimal("1.50"), pa.decimal128(5, 2), "1.50"),
        ([" B "], None, "B"),
        ([4], None, "4"),
        ("x", pa.dictionary(pa.int8(), pa.string()), "x"),
    ],
)
def test_answers_of_text_or_number(tmp_path: Path, value: Any, kind: Any, expected: str) -> None:
    assert answer_of(tmp_path, [value], kind) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["12", "12 cm"], "the answer is a list of 2; give a text or a number"),
        ([], "the answer is a list of 0"),
        ([["12"]], "the answer is a list of 1"),
        ({"value": "12"}, "the answer is a struct"),
        (b"12", "the answer is bytes"),
        (True, "the answer is true or false"),
        (float("nan"), "the answer is no finite number"),
        (float("-inf"), "the answer is no finite number"),
        (datetime.date(2024, 1, 2), "the answer is of type date"),
        ([None], "the answer is missing or empty"),
        ([" "], "the answer is missing or empty"),
    ],
)
def test_other_answers_are_refused_by_index_and_field(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"record 0, field 'answer': {words}"):
        answer_of(tmp_path, [value])


def test_a_text_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="record 0, field 'problem': of type int where a text belongs"):
        load(tmp_path, [{"problem": 3, "answer": "1", "images": []}])


@pytest.mark.parametrize("mapped", [False, True])
def test_class_labels_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0 if mapped else 2**28)
    for name, label, answers in (
        ("one", ClassLabel(names=["cat", "dog"]), [1, 0]),
        ("lists", List(ClassLabel(names=["cat", "dog"])), [[1], [0]]),
    ):
        features = Features({"problem": Value("string"), "answer": label, "image": ImageFeature()})
        rows = {"problem": ["a", "b"], "answer": answers, "image": [{"bytes": RED, "path": None}, None]}
        (tmp_path / name).mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name / "train.parquet")
        found = answers_and_images(tmp_path / name, cache_dir=tmp_path / "cache")
        assert found == [("dog", [RED]), ("cat", [])]


def test_a_label_that_is_not_given_is_a_missing_answer(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"problem": Value("string"), "answer": ClassLabel(names=["cat"]), "image": Value("string")})
    rows = {"problem": ["a"], "answer": [-1], "image": [None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InvalidInput, match="record 0, field 'answer': the answer is missing"):
        answers_and_images(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train_0.parquet", "train_1.parquet"],
        ["data/train.parquet"],
        ["train/0000.parquet", "train/0001.parquet"],
        ["data/train/a-00000-of-00001.parquet", "data/train/b-00000-of-00001.parquet"],
        ["default/train/0000.parquet"],
        ["whatever.parquet"],
    ],
)
def test_the_places_of_a_split(tmp_path: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        write(tmp_path / name, [A | {"answer": str(index)}])
    assert answers_and_images(tmp_path) == [(str(index), [RED]) for index in range(len(names))]
    with pytest.raises(NotFound, match="no Parquet file of split 'validation'"):
        load_prompts(str(tmp_path), split="validation")


@pytest.mark.parametrize("names", [["00000-of-00003", "00002-of-00003"], ["00000-of-00001", "00000-of-00002"]])
def test_shards_that_are_not_all_there_or_of_two_versions_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / f"train-{name}.parquet", [A])
    with pytest.raises(InvalidInput, match=r"has 2 shards train-…, and their names say (3|1 and 2); download"):
        load_prompts(str(tmp_path), split="train")


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_to_train_on_is_refused(tmp_path: Path, skip: bool) -> None:
    bad_records: Any = "skip" if skip else "error"
    write(tmp_path / "train.parquet", pa.Table.from_pylist([A]).slice(0, 0))
    with pytest.raises(InvalidInput, match="split 'train' has no records"):
        load_prompts(str(tmp_path), split="train", bad_records=bad_records)
    write(tmp_path / "train.parquet", [A | {"answer": ""}])
    with pytest.raises(InvalidInput, match="no record is left" if skip else "the answer is missing"):
        load_prompts(str(tmp_path), split="train", bad_records=bad_records)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"train\.parquet can't be read as Parquet"):
        load_prompts(str(tmp_path), split="train")


def lines(path: Path, *records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", ["train.jsonl", "train-0.jsonl", "train/0000.jsonl", "mine.jsonl", "train.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/r.png").write_bytes(RED)
    lines(
        tmp_path / name,
        {"problem": "<image>a", "answer": 12, "images": ["pictures/r.png"]},
        {"problem": "b", "answer": "x"},
        {"problem": "c", "answer": [0.5], "images": {"path": "pictures/r.png"}, "further": None},
    )
    assert answers_and_images(tmp_path) == [("12", [RED]), ("x", []), ("0.5", [RED])]


@pytest.mark.parametrize("line", ["[1]", "null", "{", "\udcff", '{"answer": 1' + "0" * 5000 + "}", "[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"problem": "a", "answer": "1", "images": []})
    (tmp_path / "train.jsonl").write_bytes(f"{good}\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(InvalidInput, match=r"train\.jsonl(, line 3: not a JSON object| is not UTF-8)"):
        load_prompts(str(tmp_path), split="train")


def test_an_array_of_records_in_json(tmp_path: Path) -> None:
    good = {"problem": "a", "answer": "1", "images": []}
    (tmp_path / "train.json").write_text(json.dumps([good, good]))
    assert answers_and_images(tmp_path) == [("1", []), ("1", [])]
    for text, words in (("[{]", "is not JSON"), ("[1]", "record 0: not a JSON object")):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(InvalidInput, match=words):
            answers_and_images(tmp_path)


def test_half_of_a_character_in_json_is_a_bad_record(tmp_path: Path) -> None:
    """An emoji that was cut between its two halves; no tokenizer and no message on the wire can hold it."""
    lines(tmp_path / "train.jsonl", {"problem": "Is it \ud83d?", "answer": "1", "images": []})
    with pytest.raises(InvalidInput, match=r"record 0, field 'problem': the text holds U\+D83D, half of a character"):
        load_prompts(str(tmp_path), split="train")


@pytest.mark.parametrize("marker", ["file_name", "file_names"])
@pytest.mark.parametrize("place", ["train", "data/train", "."])
def test_a_folder_of_pictures(tmp_path: Path, place: str, marker: str) -> None:
    folder = tmp_path / place
    lines(
        folder / "metadata.jsonl",
        {marker: "r.png" if marker == "file_name" else ["r.png"], "problem": "<image>a", "answer": 3},
        {"problem": "b", "answer": "4"},
    )
    (folder / "r.png").write_bytes(RED)
    assert answers_and_images(tmp_path) == [("3", [RED]), ("4", [])]


def test_one_list_of_pictures_for_both_splits(tmp_path: Path) -> None:
    for name, data in (("train/r.png", RED), ("validation/b.png", BLUE)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "train/r.png", "question": "a", "answer": "1"},
        {"file_name": "validation/b.png", "question": "b", "answer": "2"},
    )
    assert answers_and_images(tmp_path) == [("1", [RED])]
    assert answers_and_images(tmp_path, "validation") == [("2", [BLUE])]


def test_several_pictures_stand_at_their_markers(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", column([[BLUE, RED]], pa.list_(pa.binary()), text="<image> or <image>?"))
    prompt = load_prompts(str(tmp_path), split="train")[0]
    shown = [getattr(part, "sha256", getattr(part, "text", None)) for part in prompt.messages[0].content]
    assert shown == [EncodedImage(data=BLUE).sha256, " or ", EncodedImage(data=RED).sha256, "?"]


def test_an_instruction_must_not_hold_a_marker(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [A])
    with pytest.raises(InvalidInput, match="the instruction holds <image>"):
        load_prompts(str(tmp_path), split="train", instruction="Look at the <image>.")


def test_control_tokens_make_a_record_bad_and_the_image_marker_does_not(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [A, A | {"problem": "<image>a</s>"}])
    with pytest.raises(InvalidInput, match="record 1, field 'problem': the text holds '</s>'"):
        answers_and_images(tmp_path, control_tokens=["<image>", "</s>"])
    assert len(answers_and_images(tmp_path, control_tokens=["<image>", "</s>"], bad_records="skip")) == 1


def test_control_tokens_are_read_from_the_tokenizer(tmp_path: Path) -> None:
    added = [{"content": "<|end|>", "special": True}, {"content": "<think>", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert read_control_tokens(str(tmp_path)) == ["<|end|>"]
    assert read_control_tokens("nobody/nothing") == []
    (tmp_path / "tokenizer.json").write_text("[]")
    assert read_control_tokens(str(tmp_path)) == []
