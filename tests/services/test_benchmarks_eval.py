"""`vaopd eval --benchmark`: exactly one answer per question and sample, the official formulas, and the judge.

The endpoint and the judge are real HTTP servers. The official evaluator takes part where it is installed (`vaopd eval
--install`); tests of what happens around it have a stand-in program with its contract.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.benchmarks import OPTIONS, chat_server, records, write_data, write_geometry
from tests.support.models import model_folder
from tests.support.waiting import wait_until
from vaopd.benchmarks_eval.catalogue import BENCHMARKS, find_benchmarks
from vaopd.benchmarks_eval.evaluator import Evaluator, find_command, share_torch
from vaopd.benchmarks_eval.results import BenchmarkResult, make_official
from vaopd.cli import main
from vaopd.cli.benchmark import EVALUATOR
from vaopd.data.handwritten_geometry import write
from vaopd.errors import ConfigError, NumericalError

ROOT = Path(__file__).parents[2]
STAND_IN = f"{sys.executable} {ROOT / 'tests/support/stand_in_evaluator.py'}"
ALL = ("wemath", "mathvista", "mathverse", "hallusionbench", "ai2d", "mmmu", "mmstar", "ocrbench")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data")
    return tmp_path / "data"


def arguments(tmp_path: Path, data: Path, *more: str, benchmark: str = "all") -> list[str]:
    fixed = ["eval", "--benchmark", benchmark, "--out", str(tmp_path / "out"), "--benchmark-data", str(data)]
    return [*fixed, "--evaluator", STAND_IN, *more]


def text_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


RIGHT = {"WeMath": "B", "AI2D": "B", "MMMU": "B", "MMStar": "B", "Hallusion": "Yes"}


def test_the_table_equals_a_computation_by_hand(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of five questions is answered rightly in both samples, the second in one of them, the rest never."""
    lock, seen = threading.Lock(), set()

    def answer(body: dict[str, Any]) -> str:
        name, number = re.fullmatch(r"(\w+) (\d): .*", text_of(body)).groups()  # type: ignore[union-attr]
        with lock:
            first = (name, number) not in seen
            seen.add((name, number))
        right = next((text for prefix, text in RIGHT.items() if name.startswith(prefix)), "2")
        committed = right if number == "0" or (number == "1" and first) else "17"
        return f"<think>the answer is 9</think>First \\boxed{{{committed}}}, no: \\boxed{{{right}}}."

    def judge(body: dict[str, Any]) -> str:
        given, reference = body["messages"][0]["content"].rstrip("?").split(" = ")
        return "1" if given == reference else "0"

    options = ("--samples", "2", "--concurrency", "3")
    with chat_server(answer) as (url, asked), chat_server(judge, model="gpt-4o-2024-08-06") as (judge_url, judged):
        endpoint = ("--endpoint", url, "--judge-url", judge_url)
        assert main(arguments(tmp_path, data, *endpoint, *options)) == 0, capsys.readouterr().err

    assert len(asked) == 8 * 5 * 2
    assert len({(text_of(body), body["seed"]) for body in asked}) == 8 * 5 * 2
    assert {(body["temperature"], body["top_p"], body["n"]) for body in asked} == {(1.0, 1.0, 1)}
    assert asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert len(judged) == 4 * 5 * 2  # MathVista, HallusionBench, MMMU, MMStar
    assert {(body["model"], body["temperature"]) for body in judged} == {("gpt-4o-2024-08-06", 0)}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    # One run has two right of five, the other one: 40 % and 20 %, mean 30, deviation 14.142, standard error 10.
    expected = dict.fromkeys(ALL, (30.0, 10.0))
    expected["wemath"] = (22.5, 7.5)  # (15 + 30) / 2; (10 + 20) / 2 and (20 + 40) / 2
    expected["hallusionbench"] = (17.5, 35 / 6)  # 30 (1 + 1/2 + 1/4) / 3; 10 (1 + 1/2 + 1/4) / 3
    expected["ocrbench"] = (0.15, 0.05)  # 1 and 2 points of 1000
    for name, (score, error) in expected.items():
        found = summary["benchmarks"][name]
        assert found["score"] == pytest.approx(score, rel=1e-12)
        assert found["standard_error"] == pytest.approx(error, rel=1e-12)
    assert summary["math_average"] == pytest.approx((22.5 + 30 + 30) / 3)
    assert summary["visual_average"] == pytest.approx((17.5 + 30 + 30 + 30 + 0.15) / 5)
    table = capsys.readouterr().out
    assert "| wemath | 22.50 ± 7.50 | 5 | 0 |" in table
    assert "| math average | 27.50 | | |" in table

    official = json.loads((tmp_path / "out/results.json").read_text())
    assert official["protocol"]["judge_model"] == "gpt-4o-2024-08-06"
    runs = official["benchmarks"]["ocrbench"]["runs"]
    assert [(run["sample_index"], run["num_examples"]) for run in runs] == [(0, 5), (1, 5)]
    assert sorted(run["metrics"]["final_score"] for run in runs) == [1.0, 2.0]


def test_results_json_is_what_the_official_aggregator_takes() -> None:
    """Its rules, from the official repository's docs/evaluation.md: this protocol, exactly these keys, eight runs."""
    judge = "gpt-4o-2024-08-06"
    results = [
        BenchmarkResult(benchmark=b, runs=[dict.fromkeys(b.metrics, 50.0)] * 8, questions=1000) for b in BENCHMARKS
    ]
    official = make_official(results, samples=8, judge_model=judge)
    assert official["schema_version"] == 1
    assert official["protocol"] == {
        "samples_per_prompt": 8,
        "student_temperature": 1.0,
        "aggregation": "avg@8",
        "prompt_policy": "released",
        "answer_policy": "first_committed",
        "judge_model": judge,
        "judge_temperature": 0.0,
        "judge_prompt_policy": "official_verbatim",
    }
    metrics = {name: {"accuracy"} for name in ALL}
    metrics |= {"wemath": {"strict", "loose"}, "hallusionbench": {"aAcc", "fAcc", "qAcc"}, "ocrbench": {"final_score"}}
    assert list(official["benchmarks"]) == list(ALL)
    for name, found in official["benchmarks"].items():
        assert set(found) == {"split", "metric_unit", "runs"}
        assert found["metric_unit"] == ("points_1000" if name == "ocrbench" else "percent")
        assert [run["sample_index"] for run in found["runs"]] == list(range(8))
        assert {run["num_examples"] for run in found["runs"]} == {1000}
        assert all(set(run["metrics"]) == metrics[name] for run in found["runs"])
    assert official["benchmarks"]["mathvista"]["split"] == official["benchmarks"]["mathverse"]["split"] == "testmini"


def test_without_a_judge_judged_benchmarks_have_no_score(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(lambda body: "The answer is B.") as (url, _):
        options = ("--endpoint", url, "--samples", "1")
        assert main(arguments(tmp_path, data, *options, benchmark="mmstar,ai2d")) == 0
    table = capsys.readouterr().out
    assert "| ai2d | 100.00 | 5 | 0 |" in table
    assert "| mmstar | not judged | 5 | 0 |" in table
    assert "| visual average | — | | |" in table
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["benchmarks"]["mmstar"]["score"] is None
    assert summary["benchmarks"]["mmstar"]["status"] == "not judged"
    assert list(json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]) == ["ai2d"]


def find_evaluator() -> list[str]:
    try:
        return find_command(EVALUATOR)
    except ConfigError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("official", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_continues_with_each_question_and_sample_once(tmp_path: Path, data: Path, official: bool) -> None:
    """Killed with SIGKILL in mid-run, and its last line torn: 15 answers come, the others wait for the kill."""
    killed = threading.Event()
    counted = threading.Lock()
    count = 0

    def answer(body: dict[str, Any]) -> str:
        nonlocal count
        with counted:
            count += 1
            waits = count > 15
        if waits:
            killed.wait(60)
        return "The answer is B."

    file = tmp_path / "out/ai2d/answers.jsonl"
    with chat_server(answer) as (url, asked):
        argv = arguments(tmp_path, data, "--endpoint", url, "--concurrency", "2", benchmark="ai2d")
        argv += ["--evaluator", shlex.join(find_evaluator())] if official else []
        process = subprocess.Popen(
            [sys.executable, "-m", "vaopd.cli", *argv], env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        try:
            wait_until("two requests wait", lambda: count == 17)
            wait_until("15 answers are stored", lambda: file.exists() and file.read_bytes().count(b"\n") == 15)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.set()
        before = file.read_bytes()
        file.write_bytes(before + before.splitlines()[0][:40])
        wait_until("the killed requests are over", lambda: len(asked) == 17)
        asked.clear()
        assert main(argv) == 0
        assert len(asked) == 5 * 8 - 15
        asked.clear()
        assert main(argv) == 0  # finished: neither asked nor scored again
        assert asked == []
    assert file.read_bytes().startswith(before)
    stored = [(line["question"], line["sample"]) for line in lines_of(file)]
    assert sorted(stored) == [(str(question), sample) for question in range(5) for sample in range(8)]
    assert json.loads((tmp_path / "out/summary.json").read_text())["benchmarks"]["ai2d"]["score"] == 100.0


def test_answers_of_other_settings_are_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(lambda body: "The answer is B.") as (url, _):
        argv = arguments(tmp_path, data, "--endpoint", url, "--samples", "1", benchmark="ai2d")
        assert main(argv) == 0
        assert main([*argv, "--max-tokens", "9"]) == 2
    assert "other settings (max_tokens); choose another --out" in capsys.readouterr().err


def test_a_failing_evaluator_is_shown_and_scores_nothing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "AI2D_TEST.tsv").unlink()
    with chat_server(lambda body: "The answer is B.") as (url, _):
        assert main(arguments(tmp_path, data, "--endpoint", url, benchmark="ai2d")) == 2
    assert "FileNotFoundError" in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()


def test_a_program_that_cannot_be_started_is_named(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path, data, "--endpoint", "http://127.0.0.1:9/v1", "--evaluator", "/no/such", benchmark="ai2d")
    assert main(argv) == 2
    assert "evaluator can't be started: '/no/such': No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((200, {}, b"<html>"), "sent no JSON: '<html>'; give the URL up to /v1"),
        ((200, {}, b'{"error": "quota"}'), "sent no text for question '0': {'error': 'quota'}"),
        ([{"type": "text", "text": "The answer is B."}], "sent no text for question '0'"),
        ((401, {}, b"no key"), "question '0': the endpoint answered 401: no key"),
    ],
)
def test_a_reply_without_an_answer_is_shown_and_stores_none(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    with chat_server(lambda body: content) as (url, _):
        assert main(arguments(tmp_path, data, "--endpoint", url, "--concurrency", "1", benchmark="ai2d")) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "out/ai2d/answers.jsonl").read_text() == ""


def test_a_busy_endpoint_is_asked_again_and_an_empty_answer_is_one(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retry-After may be a date, of which the endpoint's clock is not ours. A content of null is an empty answer."""
    replies = iter([(429, {"Retry-After": "Fri, 27 Nov 2026 06:00:00 GMT"}, b"busy"), None, "", "\\boxed{B}", "B", "B"])
    with chat_server(lambda body: next(replies)) as (url, asked):
        options = ("--endpoint", url, "--samples", "1", "--concurrency", "1")
        assert main(arguments(tmp_path, data, *options, benchmark="ai2d")) == 0
    assert len(asked) == 6
    assert "| ai2d | 60.00 | 5 | 0 |" in capsys.readouterr().out
    answers = lines_of(tmp_path / "out/ai2d/answers.jsonl")
    assert [(line["answer"], line["committed"]) for line in answers] == [
        ("", False), ("", False), ("B", True), ("B", False), ("B", False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("score-0.json", '{"metrics": {"acc', None),
        ("score-0.json", "[]", None),
        ("score-0.json", '{"metrics": null, "num_examples": 5, "judge_model": null}', "accuracy = None"),
        ("answers.jsonl", '{"question": "0"}\n', "answers.jsonl:1: an answer needs"),
        ("answers.jsonl", '{"question": [], "sample": 0, "cut_off": false}\n', "answers.jsonl:1: an answer needs"),
        ("answers.jsonl", '{"question": "9", "sample": 0, "cut_off": false}\n', "one of questions.jsonl"),
        ("answers.jsonl", 2 * '{"question": "0", "sample": 0, "cut_off": false}\n', "answers.jsonl:2: question '0'"),
        ("questions.jsonl", '{"id": "0", "parts": []}\n{"id": "1", "parts": []}', "its last line has no end"),
        ("questions.jsonl", "", "questions.jsonl is empty"),
        ("questions.jsonl", '{"id": "0", "parts": [{"value": "x"}]}\n', "`parts` of `type` and `value`"),
    ],
)
def test_a_half_written_file_is_made_again_or_named(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str | None
) -> None:
    with chat_server(lambda body: "B") as (url, asked):
        argv = arguments(tmp_path, data, "--endpoint", url, "--samples", "1", benchmark="ai2d")
        assert main(argv) == 0
        (tmp_path / "out/ai2d" / name).write_text(text)
        assert main(argv) == (0 if message is None else 2)
        assert len(asked) == 5
    printed = capsys.readouterr()
    if message is None:
        assert printed.out.count("| ai2d | 100.00 | 5 | 0 |") == 2
    else:
        assert message in printed.err


@pytest.mark.parametrize("value", [None, math.nan, 101, True, "50"])
def test_a_metric_that_is_no_percentage_is_an_error(value: object) -> None:
    [benchmark] = find_benchmarks("ai2d")
    with pytest.raises(NumericalError, match=r"ai2d: accuracy = .* is not a number from 0 to 100"):
        benchmark.check({"accuracy": value})


@pytest.mark.parametrize(
    ("name", "metrics", "score"),
    [
        ("wemath", {"strict": 30.0, "loose": 45.0}, 37.5),
        ("hallusionbench", {"aAcc": 60.0, "fAcc": 30.0, "qAcc": 45.0}, 45.0),
        ("ocrbench", {"final_score": 864.0}, 86.4),
        ("mmmu", {"accuracy": 51.5}, 51.5),
    ],
)
def test_scores_are_percentages(name: str, metrics: dict[str, float], score: float) -> None:
    [benchmark] = find_benchmarks(name)
    assert benchmark.score(benchmark.check(metrics)) == pytest.approx(score, rel=1e-12)


# Dataset -> five answers, and the official evaluator's metrics by hand. Every right option is B, its text "2".
BY_HAND: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    # Two steps: one of the parts wrong, the whole right: mastered loosely, learnt by rote strictly. Three: not known.
    "WeMath": (("A", "B", "B", "A", "A"), {"strict": 99.62, "loose": 99.81}),  # 523 and 524 of the benchmark's 525
    "MathVista_MINI": (("2", "zwei", "17", "2", "17"), {"accuracy": 60.0}),  # the judge extracts 2 from "zwei"
    "MathVerse_MINI": (("2", " 2 ", "2.", "2", "3"), {"accuracy": 60.0}),  # text, without spaces around it
    # Right, right, right by the judge, right, wrong. Figures: 0, 2, 4 and 1, 3. Questions: 0, 1 and 2, 3 and 4.
    "HallusionBench": (("Yes", "yes.", "vielleicht", "Yes", "No"), {"aAcc": 80.0, "fAcc": 50.0, "qAcc": 200 / 3}),
    "AI2D_TEST": (("B", "(B)", "C", "2", "nothing"), {"accuracy": 60.0}),
    "MMMU_DEV_VAL": (("B", "zweite", "C", "2", "nothing"), {"accuracy": 60.0}),
    "MMStar": (("B", "zweite", "B.", "2", "nothing"), {"accuracy": 80.0}),
    "OCRBench": (("2", "it says 2.", "3", "12", ""), {"final_score": 3.0}),  # what contains the text is right
}


def test_the_evaluators_environment_shares_our_torch_and_nothing_else(tmp_path: Path) -> None:
    site = tmp_path / "lib/python3/site-packages"
    site.mkdir(parents=True)
    assert {"torch", "torchvision"} <= set(share_torch(tmp_path))
    code = (
        "import importlib.metadata as m, importlib.util as u, site, sys; site.addsitedir(sys.argv[1]); "
        "print(u.find_spec('torch').origin, m.version('torch'), u.find_spec('pydantic'))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(site)]
    origin, version, other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ours = importlib.util.find_spec("torch")
    assert ours is not None
    assert Path(origin).resolve() == Path(str(ours.origin)).resolve()
    assert (version, other) == (importlib.metadata.version("torch"), "None")


def test_a_part_of_an_installation_is_no_evaluator(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    with pytest.raises(ConfigError, match=r"no ms-vlmeval==.* `vaopd eval --install` installs it"):
        find_command(tmp_path)


@pytest.mark.slow
def test_the_official_evaluator_scores_as_computed_by_hand(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All eight in one process. With none solved in WeMath, the evaluator by itself would divide 0 by 0."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    evaluator = Evaluator(command=find_evaluator(), data=data, logs=tmp_path / "logs", say=print)
    found = {"vielleicht": "Yes", "zweite": "B", "zwei": "2", "unklar": "Das kann ich nicht sagen."}

    def judge(body: dict[str, Any]) -> str:
        return next((reply for word, reply in found.items() if word in body["messages"][0]["content"]), "Z")

    cases = [(name, *case) for name, case in BY_HAND.items()]
    cases.append(("WeMath", ("A",) * 5, {"strict": 99.62, "loose": 99.62}))
    # No reply of the judge is a verdict: wrong, and never right by chance.
    cases += [(name, ("unklar",) * 5, {"accuracy": 0.0}) for name in ("MMMU_DEV_VAL", "MMStar", "MathVista_MINI")]
    cases.append(("HallusionBench", ("unklar",) * 5, dict.fromkeys(("aAcc", "fAcc", "qAcc"), 0.0)))
    with chat_server(judge, model="team/judge") as (url, judged):
        tasks = []
        for number, (name, answers, _) in enumerate(cases):
            [benchmark] = [benchmark for benchmark in BENCHMARKS if benchmark.dataset == name]
            ids = [row["index"] for row in records(name)]
            lines = [{"question": str(i), "sample": 3, "answer": a} for i, a in zip(ids, answers, strict=True)]
            file = tmp_path / f"{number}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            given = {"dataset": name, "split": benchmark.split, "answers": str(file), "sample": 3}
            asks = {"judge_url": url, "judge_model": "team/judge"} if benchmark.judged else {}
            tasks.append({"task": "score", "out": str(tmp_path / f"{number}.json"), **given, **asks})
        evaluator.run(tasks)
    for number, (name, _, metrics) in enumerate(cases):
        scores = json.loads((tmp_path / f"{number}.json").read_text())
        assert (name, scores["metrics"], scores["num_examples"]) == (name, pytest.approx(metrics, rel=1e-12), 5)
    decided = [body for body in judged if "unklar" not in body["messages"][0]["content"]]  # else repeated, and warmer
    assert {(body["model"], body["temperature"]) for body in decided} == {("team/judge", 0)}
    assert "sk-secret" not in (tmp_path / "logs/evaluator.log").read_text()


def is_right(name: str, row: dict[str, Any], answer: str) -> bool:
    """The benchmark's rules for numbers, written anew. Nobody answers by letters here, and the judge knows nothing."""
    if name == "MathVista_MINI":
        return answer.isdecimal() and int(answer) == int(row["answer"])
    if name == "MathVerse_MINI":
        return answer.strip() == row["answer"]
    if name == "OCRBench":
        return row["answer"].strip("[]'") in answer
    texts = {letter: str(row[letter]) for letter in OPTIONS}
    named = [letter for letter, text in texts.items() if text in answer]
    return len(answer) <= 2 * sum(map(len, texts.values())) and named == [row["answer"]]


@pytest.mark.slow
def test_a_checkpoint_is_served_with_vllm_and_scored_as_a_count_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny student on five problems of handwritten geometry in each schema that takes a number for an answer."""
    write(tmp_path, seed=0, train=0, validation=0, test=30)
    tables = write_geometry(tmp_path / "data", tmp_path / "test.parquet", 5)
    benchmarks = [benchmark for benchmark in BENCHMARKS if benchmark.dataset in tables]
    names = ",".join(benchmark.name for benchmark in benchmarks)
    argv = arguments(tmp_path, tmp_path / "data", "--model", str(model_folder("student")), benchmark=names)
    with contextlib.suppress(ConfigError):
        argv += ["--evaluator", shlex.join(find_command(EVALUATOR))]
    with chat_server(lambda body: "Z") as (url, _):
        assert main([*argv, "--max-tokens", "64", "--judge-url", url]) == 0, capsys.readouterr().err
    answers = {b.name: lines_of(tmp_path / "out" / b.name / "answers.jsonl") for b in benchmarks}
    assert all(len({(line["question"], line["sample"]) for line in lines}) == 5 * 8 for lines in answers.values())
    find_evaluator()  # without it the test ends here, skipped
    summary = json.loads((tmp_path / "out/summary.json").read_text())["benchmarks"]
    for benchmark in benchmarks:
        rows = {str(row["index"]): row for row in tables[benchmark.dataset]}
        right = [0] * 8
        for line in answers[benchmark.name]:
            right[line["sample"]] += is_right(benchmark.dataset, rows[line["question"]], line["answer"])
        scores = [count / 10 if benchmark.name == "ocrbench" else 20 * count for count in right]
        assert summary[benchmark.name]["score"] == pytest.approx(statistics.fmean(scores), rel=1e-12)
        error = statistics.stdev(scores) / math.sqrt(8)
        assert summary[benchmark.name]["standard_error"] == pytest.approx(error, rel=1e-12)
