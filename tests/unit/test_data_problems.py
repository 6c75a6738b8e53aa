"""A run's problems before it starts: pictures decoded, lengths counted, training and held-out disjoint."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.models import model_folder
from vaopd.cli import main
from vaopd.config import Config, VllmRollout, validate
from vaopd.data import measures
from vaopd.data.measures import CACHE_VARIABLE, Meter
from vaopd.data.problems import check_held_out, check_training, load_problems
from vaopd.errors import ConfigError, InvalidInput
from vaopd.images import decode
from vaopd.types import Prompt
from vaopd.vlm.prompts import PromptReader


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form, **options)
    return file.getvalue()


CUT = picture(size=(300, 200))[:80]  # a PNG's header, and half of what follows


def record(problem: str, *pictures: bytes, answer: str = "1") -> dict[str, Any]:
    images = [{"bytes": data, "path": None} for data in pictures]
    return {"problem": "<image>" * len(pictures) + problem, "answer": answer, "images": images}


def write(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("validation", validation or [record("held out")])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def configure(source: Path, *, model: str | Path = "", prompts: int = 200, **data: Any) -> Config:
    values = {
        "run": {"name": "r"},
        "data": {"source": str(source), **data},
        "student": {"model": str(model or model_folder("student"))},
        "teacher": {"model": "unused"},
        "trainer": {"steps": 1},
        "evaluation": {"prompts": prompts},
    }
    return validate(Config, values, origin="test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def length_of(prompt: Prompt, config: Config) -> int:
    """The tokens that teacher and trainer read: real pictures, scaled and prepared."""
    reader = PromptReader.open(
        config.student.model, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels
    )
    images = {image.sha256: reader.prepare_image(reader.scale_image(decode(image))) for image in prompt.images}
    return len(reader.render(prompt.messages, images).token_ids)


def test_lengths_are_those_of_the_prompts_that_a_run_reads(tmp_path: Path) -> None:
    rows = [
        record("no picture"),
        record("one", picture(size=(97, 61))),
        record("two, one of them large", picture("blue", (700, 300), "JPEG"), picture("red", (33, 400), "WEBP")),
        record("twice the same", picture(), picture()),
    ]
    config = configure(write(tmp_path / "set", rows), min_pixels=4096, max_pixels=65536)
    split = check_training(config)
    assert [split.measured[index].tokens for index in range(4)] == [length_of(p, config) for p in split.prompts]
    assert split.measured[2].sizes == ((700, 300), (33, 400))
    assert split.measured[3].sizes == ((40, 30), (40, 30))


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (record("cut", CUT), "picture", r"record 1, field 'images\[0\]': image .* is damaged; re-encode it"),
        (record("two", picture(), CUT), "picture", r"record 1, field 'images\[1\]': image .* is damaged"),
        (record("ratio", picture(size=(402, 2))), "picture", "the limit is an aspect ratio of 200; crop it"),
        (record("no picture at all", b"GIF89a"), "picture", r"field 'images\[0\]': not a PNG, JPEG or WEBP image"),
        (record(" "), "text", "field 'problem': the text is missing or empty"),
        (record("<image>"), "text", "the text is missing or empty"),
        (record("<image>mark"), "image markers", "the text has 1 <image> markers and the record 0 images"),
        (record("a <|im_end|> b"), "control token", r"the text holds '<\|im_end\|>', a control token"),
        (record("held  out"), "overlap", "the same question and pictures as split 'validation', record 0"),
        (
            record("so many words " * 40),
            "over-long",
            r"the prompt has \d+ tokens, the limit is data.max_prompt_tokens = 60",
        ),
    ],
)
def test_a_bad_record_is_named_before_a_run_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: dict[str, Any], kind: str, words: str
) -> None:
    source = write(tmp_path / "set", [record("first"), bad, record("last")])
    with pytest.raises(InvalidInput, match=words) as caught:
        load_problems(configure(source, max_prompt_tokens=60))
    assert str(caught.value).startswith(
        f"data.source = {source}: 1 of 3 records can't be used (1 {kind}: record 1); the first: "
    )
    assert "--set data.bad_records=skip" in str(caught.value)

    skipping = {"max_prompt_tokens": 60, "bad_records": "skip"}
    with pytest.raises(InvalidInput, match=r"33\.3%, above data\.max_bad_fraction = 1\.0%"):
        load_problems(configure(source, **skipping))

    problems = load_problems(configure(source, max_bad_fraction=0.34, **skipping))
    assert [prompt.prompt_id for prompt in problems.training.prompts] == ["train-0", "train-2"]
    assert problems.training.count_faults() == {kind: 1}
    assert f"left out: 1 of 3 records can't be used (1 {kind}: record 1); the first: " in caplog.text


def test_a_prompt_leaves_room_for_the_longest_response(tmp_path: Path) -> None:
    """An engine would cut the response early, and it would count as the student's own."""
    source = write(tmp_path / "set", [record("first"), record("so many words " * 40)])
    config = configure(source).model_copy(
        update={"rollout": VllmRollout(max_new_tokens=40, engine_options={"max_model_len": 100})}
    )
    words = r"record 1.* the limit is rollout\.engine_options\.max_model_len = 100 less rollout\.max_new_tokens = 40; "
    with pytest.raises(InvalidInput, match=words):
        load_problems(config)


def test_the_longest_picture_is_taken(tmp_path: Path) -> None:
    """4000×20 has the ratio 200, the processor's limit; scaled to 65536 pixels and floored, 3620×18, 201."""
    source = write(tmp_path / "set", [record("a", picture(size=(4000, 20)))])
    assert check_training(configure(source, max_pixels=65536)).faults == ()


def test_a_picture_that_the_processor_refuses_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of another family might."""

    def refuse(self: PromptReader, image: Image.Image) -> None:
        raise ValueError(f"{image.width} is too wide")

    monkeypatch.setattr(PromptReader, "prepare_image", refuse)
    source = write(tmp_path / "set", [record("a", picture(size=(4000, 20)))])
    [fault] = check_training(configure(source)).faults
    assert (fault.kind, fault.field) == ("picture", "images[0]")
    assert fault.message == "the model's processor refuses a picture of 4000×20: 4000 is too wide"


def test_a_prompt_of_exactly_the_limit_is_taken(tmp_path: Path) -> None:
    source = write(tmp_path / "set", [record("How long is it?", picture())])
    config = configure(source)
    tokens = length_of(check_training(config).prompts[0], config)
    assert check_training(configure(source, max_prompt_tokens=tokens)).faults == ()
    assert check_training(configure(source, max_prompt_tokens=tokens - 1)).count_faults() == {"over-long": 1}


def test_a_split_without_a_sound_record_is_refused_whatever_the_bound(tmp_path: Path) -> None:
    source = write(tmp_path / "set", [record("a", CUT)])
    with pytest.raises(InvalidInput, match="no record is left to train on"):
        load_problems(configure(source, bad_records="skip", max_bad_fraction=1.0))


def test_bad_held_out_records_are_allowed_as_bad_training_records_are(tmp_path: Path) -> None:
    source = write(tmp_path / "set", [record("a")], [record("b", CUT), record("c")])
    with pytest.raises(
        InvalidInput, match=r"1 of 2 records can't be used \(1 picture: record 0\).*'validation', record 0"
    ):
        load_problems(configure(source))
    held_out = load_problems(configure(source, bad_records="skip", max_bad_fraction=0.5)).held_out
    assert [prompt.prompt_id for prompt in held_out.prompts] == ["validation-1"]
    assert held_out.count_faults() == {"picture": 1}


@pytest.mark.parametrize(
    ("training", "overlaps"),
    [
        (record("How long?", picture("blue", form="WEBP", lossless=True)), True),  # another encoding
        (record(" How  long?\n", picture("blue", compress_level=0)), True),  # other spaces, other bytes
        (record("How long?", picture("navy")), False),
        (record("How wide?", picture("blue")), False),
        (record("How long?", picture("blue"), picture("blue")), False),
        (record("How long?"), False),
    ],
)
def test_a_problem_is_its_words_and_its_pixels(tmp_path: Path, training: dict[str, Any], overlaps: bool) -> None:
    source = write(tmp_path / "set", [record("other"), training], [record("How long?", picture("blue"))])
    if not overlaps:
        load_problems(configure(source))
        return
    with pytest.raises(InvalidInput, match=r"\(1 overlap: record 1\).*record 1, .*split 'validation', record 0"):
        load_problems(configure(source))


def test_only_the_held_out_problems_that_are_evaluated_count_for_the_overlap(tmp_path: Path) -> None:
    """Of three records the sample takes two; a training problem may be the third."""
    chosen = sorted(random.Random(42).sample(range(3), 2))
    [other] = {0, 1, 2} - set(chosen)
    validation = [record(f"held out {index}") for index in range(3)]
    load_problems(configure(write(tmp_path / "a", [validation[other]], validation), prompts=2))
    with pytest.raises(InvalidInput, match="1 overlap"):
        load_problems(configure(write(tmp_path / "b", [validation[chosen[0]]], validation), prompts=2))


def test_the_held_out_200_are_the_paper_s(tmp_path: Path) -> None:
    source = write(tmp_path / "set", [record("a")], [record(f"held out {index}") for index in range(300)])
    expected = sorted(random.Random(42).sample(range(300), 200))
    ids = [prompt.prompt_id for prompt in check_held_out(configure(source)).prompts]
    assert ids == [f"validation-{index}" for index in expected]
    assert len(check_held_out(configure(source, prompts=1000)).prompts) == 300


def test_measures_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A second check decodes nothing and opens no processor, bad records included; what changes is measured again."""
    rows = [record("a", picture()), record("b", CUT), record("c")]
    config = configure(write(tmp_path / "set", rows))
    first = check_training(config)
    decoded: list[str] = []
    opened: list[str] = []

    def note(image: Any) -> Image.Image:
        decoded.append(image.sha256)
        return decode(image)

    def note_opening(self: Meter) -> PromptReader:
        opened.append(self.model)
        return original(self)

    original = Meter._open
    monkeypatch.setattr(measures, "decode", note)
    monkeypatch.setattr(Meter, "_open", note_opening)
    assert check_training(config).measured == first.measured
    assert check_training(config).faults == first.faults
    assert (decoded, opened) == ([], [])

    write(tmp_path / "set", [*rows[:2], record("d", picture("blue"))])
    assert check_training(config).measured[0] == first.measured[0]
    assert len(decoded) == len(opened) == 1

    larger = check_training(configure(tmp_path / "set", min_pixels=65536))
    assert larger.measured[0].tokens != first.measured[0].tokens
    for file in cache.iterdir():
        file.write_text("{damaged")
    assert check_training(config).measured[0] == first.measured[0]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert len(check_training(configure(write(tmp_path / "set", [record("a", picture())]))).measured) == 1


def test_without_the_student_s_processor_everything_but_the_lengths_is_checked(tmp_path: Path) -> None:
    split = check_training(configure(write(tmp_path / "set", [record("a", picture()), record("b", CUT)]), model="none"))
    assert split.measured[0].tokens is None
    assert split.count_faults() == {"picture": 1}


def test_a_processor_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "processor_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    config = configure(write(tmp_path / "set", [record("a")]), model=tmp_path / "model")
    with pytest.raises(ConfigError, match=r"the processor of .*/model' can't be loaded"):
        check_training(config)


def test_virl39k_of_the_hub_with_its_images_inside(tmp_path: Path) -> None:
    """The columns of PAPOGalaxy/PAPO_ViRL39K_train: id, problem, answer, a list of structs whose path is null."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.null())])
    schema = pa.schema(
        [("id", pa.string()), ("problem", pa.string()), ("answer", pa.string()), ("images", pa.list_(image))]
    )
    rows = [
        {**record("Which?", picture(), answer=r"\boxed{D}"), "id": "mmmath-17"},
        {**record("Both?", picture(), picture("blue"), answer=r"\boxed{3}"), "id": "geo-4"},
        {"id": "text-1", "problem": "What is 2+2?", "answer": r"\boxed{4}", "images": []},
        {
            "id": "lost-1",
            "problem": "Its marker was lost.",
            "answer": "A",
            "images": [{"bytes": picture(), "path": None}],
        },
    ]
    (tmp_path / "set/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "set/data/train-00000-of-00001.parquet")
    held_out = write(tmp_path / "other", [], [record("held out")])
    problems = load_problems(configure(tmp_path / "set", validation_source=str(held_out)))
    assert [(p.prompt_id, p.answer, len(p.images)) for p in problems.training.prompts] == [
        ("mmmath-17", r"\boxed{D}", 1),
        ("geo-4", r"\boxed{3}", 2),
        ("text-1", r"\boxed{4}", 0),
        ("lost-1", "A", 1),
    ]


def test_an_error_of_the_validation_source_names_its_key(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", [], [record("b", CUT)])
    config = configure(write(tmp_path / "set", [record("a")]), validation_source=str(bad))
    with pytest.raises(InvalidInput, match=r"^data\.validation_source = .*/bad: 1 of 1 records can't be used"):
        load_problems(config)


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["data", "check", *arguments])
    return code, capsys.readouterr().out


def test_the_command_names_every_bad_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record("a", picture()), record("b", CUT), record("a", picture(form="WEBP", lossless=True)), record("", CUT)]
    source = write(tmp_path / "set", rows, [record("held out"), record("a", picture())])
    code, shown = check(capsys, str(source))
    assert code == 1
    lines = shown.splitlines()
    assert lines[0] == f"{source}, split 'train': 4 records, 2 of them bad"
    assert lines[1] == "  pictures       2: smallest 40×30, median 40×30, largest 40×30 px"
    assert lines[2] == "  duplicates     1: records 2 = 0"
    assert lines[3:5] == ["  bad: picture             1   record 1", "  bad: text                1   record 3"]
    assert lines[5].startswith("  train, record 1, field 'images[0]': image ")
    assert lines[6] == "  train, record 3, field 'problem': the text is missing or empty"
    assert f"{source}, split 'validation': 2 records, 0 of them bad" in lines

    code, shown = check(capsys, str(source), "--split", "validation", "--model", str(model_folder("student")))
    assert code == 0
    assert "prompt tokens  min " in shown
    for arguments, told in (
        ((str(source), "--set", "data.columns.text=a"), "--set is for a CONFIG, and "),
        (("run.toml", "--split", "train"), "--split is for a DATASET, and run.toml is none"),
        ((str(source), "--column", "text"), "--column 'text' is not of the form KEY=NAME"),
    ):
        assert main(["data", "check", *arguments]) == 2
        assert told in capsys.readouterr().err


def test_the_command_reads_a_run_s_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "set", [record("a", picture()), record("held out")])
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'[run]\nname = "r"\n[data]\nsource = "{source}"\n[student]\nmodel = "{model_folder("student")}"\n'
        '[teacher]\nmodel = "unused"\n[trainer]\nsteps = 1\n'
    )
    code, shown = check(capsys, str(toml), "--json")
    assert code == 1
    training, held_out = json.loads(shown)["splits"]
    assert (training["records"], training["usable"], training["bad_by_kind"]) == (2, 1, {"overlap": 1})
    assert (training["bad"][0]["record"], training["bad"][0]["field"]) == (1, "problem")
    assert training["pixels"] == {"min": 1200, "median": 1200, "max": 1200}
    assert (held_out["usable"], held_out["bad"], held_out["pixels"]) == (1, [], None)
    code, _ = check(capsys, str(toml), "--set", 'data.train_split="validation"', "--set", "evaluation.prompts=1")
    assert code == 1  # all of it is held out


def test_the_command_says_when_there_is_no_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "none of the splits train, validation, test, val, dev: " in capsys.readouterr().err


def test_the_command_reads_splits_of_other_names_and_counts_unusable_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "set", [record("a") | {"answer": None}, record("b")], [record("c")])
    (source / "validation.parquet").rename(source / "val.parquet")
    code, shown = check(capsys, str(source))
    assert code == 0
    assert f"{source}, split 'val': 1 records, 0 of them bad" in shown
    assert "  answers        1 of 2 without an answer that can be compared with" in shown
    assert main(["data", "convert", str(source), str(tmp_path / "new")]) == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["train.parquet", "val.parquet"]
    assert "train.parquet: 2 records, 1 of 2 without an answer" in capsys.readouterr().out
