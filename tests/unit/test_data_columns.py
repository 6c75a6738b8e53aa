"""Data sets with other names, system prompts and turns, and records without answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_data_forms import RED, answers_and_images
from vaopd.cli import main
from vaopd.config import ColumnsConfig
from vaopd.data.convert import write_split
from vaopd.data.loaders import Prompts, open_split
from vaopd.errors import InvalidInput
from vaopd.types import ImagePart, Prompt, TextPart


def write(folder: Path, *records: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "red.png").write_bytes(RED)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def show(prompt: Prompt) -> list[tuple[str, str]]:
    """Each message's role and text, # for an image."""
    texts = {ImagePart: lambda part: "#", TextPart: lambda part: part.text}
    return [(m.role, "".join(texts[type(part)](part) for part in m.content)) for m in prompt.messages]


def open_train(source: str, **options: Any) -> Prompts:
    prompts = open_split(source, split="train", needs_answer=False, **options)
    assert prompts.find_faults() == []
    return prompts


def test_a_configuration_names_the_columns(tmp_path: Path) -> None:
    record = {"prompt": "Where?", "picture": "red.png", "label": "here", "uid": "a7", "rules": "Be brief."}
    source = write(tmp_path, record, record | {"rules": ""})
    columns = ColumnsConfig(text="prompt", images="picture", answer="label", id="uid", system="rules")
    first, second = open_train(source, columns=columns, system_prompt="Look.", instruction="One word.")
    assert show(first) == [("system", "Be brief."), ("user", "#Where?\nOne word.")]
    assert show(second)[0] == ("system", "Look.")
    assert (first.prompt_id, first.answer, first.images[0].data) == ("a7", "here", RED)
    with pytest.raises(InvalidInput, match=r"columns prompt, .*; needed: problem or question.*data\.columns\.text="):
        open_train(source)
    with pytest.raises(InvalidInput, match=r"needed: data\.columns\.text = querry; "):
        open_train(source, columns=ColumnsConfig(text="querry"))
    # A name that is not there isn't passed over for a known one, except where the names are another data set's.
    source = write(tmp_path / "usual", {"problem": "Where?", "images": ["red.png"], "answer": "here"})
    with pytest.raises(InvalidInput, match=r"needed: data\.columns\.text = querry; "):
        open_train(source, columns=ColumnsConfig(text="querry"))
    assert open_train(source, columns=columns, may_differ=True)[0].answer == "here"


def test_turns_as_chat_templates_and_llava_have_them(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "red.png"}}, "Which ", {"type": "text", "text": "colour?"}]
    chat = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": parts},
        {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    llava = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}]
    (prompt,) = open_train(write(tmp_path / "chat", {"messages": chat, "images": ["red.png"]}), system_prompt="unused")
    assert show(prompt) == [
        ("system", "Be brief."),
        ("user", "#Which colour?"),
        ("assistant", "Red."),
        ("user", "Sure?"),
    ]
    (prompt,) = open_train(write(tmp_path / "llava", {"conversations": llava, "image": "red.png"}))
    assert show(prompt) == [("user", "#Which colour?")]  # the reference is left out


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "don't end with the user's"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "turn 2 has no role of system, user"),
        ([{"role": "user", "content": ""}], "turn 1: the text is missing or empty"),
        (None, "don't end with the user's"),
        ("Where?", "of type str where a list of turns belongs"),
        ([{"role": ["user"], "content": "a"}], "turn 1 has no role of system, user"),
        (
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}],
            "turn 1: a part is 'video'",
        ),
    ],
)
def test_turns_that_are_none(tmp_path: Path, turns: object, words: str) -> None:
    source = write(tmp_path, {"messages": turns, "images": []})
    (fault,) = open_split(source, split="train", needs_answer=False).find_faults()
    assert (fault.kind, fault.field) == ("text", "messages")
    assert words in fault.message


def test_only_evaluation_needs_answers(tmp_path: Path) -> None:
    source = write(tmp_path, {"problem": "a", "images": []}, {"problem": "b", "images": [], "answer": [1, 2]})
    assert [prompt.answer for prompt in open_train(source)] == ["", ""]
    faults = open_split(source, split="train").find_faults()
    assert [fault.message.split(";")[0] for fault in faults] == [
        "the answer is missing or empty", "the answer is a list of 2",
    ]  # fmt: skip


def test_a_converted_data_set_needs_no_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one with turns, which keeps them."""
    source = write(tmp_path / "own", {"prompt": "Is <image> red?", "picture": "red.png", "label": "yes"})
    command = ["data", "convert", source, str(tmp_path / "new"), "--column", "text=prompt", "--column"]
    assert main([*command, "images=picture", "--column", "answer=label"]) == 0
    assert main([*command, "images=picture"]) == 2  # what is there stays
    assert "train.parquet already exists" in capsys.readouterr().err
    assert answers_and_images(tmp_path / "new") == [("yes", [RED])]
    assert show(open_train(str(tmp_path / "new"))[0]) == [("user", "Is # red?")]
    turns = [{"role": "system", "content": "Look."}, {"role": "user", "content": "<image>Red?"}]
    source = write(tmp_path / "chat", {"messages": turns, "images": ["red.png"]})
    write_split(open_train(source), tmp_path / "turns" / "train.parquet")
    assert show(open_train(str(tmp_path / "turns"))[0]) == [("system", "Look."), ("user", "#Red?")]
