"""Five records of each benchmark, in the evaluator's own schema, and an endpoint that answers them.

`python -m tests.support.benchmarks FOLDER PROBLEMS.parquet COUNT` writes problems that a tiny model can solve instead,
into the schemas that take a number for an answer, as docs/figures.md needs them.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

Reply = Callable[[dict[str, Any]], Any]
"""The message's content, or, as a tuple, status, headers and body of the whole reply."""

OPTIONS = {"A": "1", "B": "2", "C": "3", "D": "4"}


def picture(shade: int) -> str:
    """A grey PNG of 56 x 56 pixels in base64; the evaluator takes anything above 64 characters for an image."""
    buffer = io.BytesIO()
    Image.effect_noise((56, 56), 40 + shade).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def records(dataset: str) -> list[dict[str, Any]]:
    """The five records. Every right option is B, every right text "2", every right yes-or-no answer "1" (yes)."""
    rows: list[dict[str, Any]] = []
    for number in range(5):
        row: dict[str, Any] = {"index": number, "image": picture(number), "question": f"{dataset} {number}: 1 + 1?"}
        row |= SCHEMAS[dataset](number)
        rows.append(row)
    return rows


STEPS = ("2steps_1", "2steps_2", "2steps_multi", "3steps_1", "3steps_multi")
SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "WeMath": lambda n: (
        OPTIONS
        | {"answer": "B", "ID": 1 + (n > 2), "key": STEPS[n], "split": "testmini"}
        | {"knowledge concept": "Addition", "knowledge concept description": "adds"}
    ),
    "MathVista_MINI": lambda n: {
        "answer": "2",
        "question_type": "free_form",
        "answer_type": "integer",
        "precision": "",
        "choices": "[]",
        "answer_option": "",
        "unit": "",
        "task": "geometry problem solving",
        "skills": "['arithmetic reasoning']",
    },
    "MathVerse_MINI": lambda n: {
        "answer": "2",
        "question_for_eval": "1 + 1?",
        "problem_version": "Vision Only",
        "metadata": "{'subject': 'Plane Geometry', 'subfield': 'Length'}",
    },
    "HallusionBench": lambda n: {
        "index": f"VD_chart_x_0_{n % 2}_{n // 2}",  # two figures, three questions
        "answer": "Yes",
        "category": "VD",
        "l2-category": "chart",
    },
    "AI2D_TEST": lambda n: OPTIONS | {"answer": "B", "category": "cells"},
    "MMMU_DEV_VAL": lambda n: (
        OPTIONS | {"answer": "B", "split": "validation", "category": "Math", "l2-category": "Art"}
    ),
    "MMStar": lambda n: OPTIONS | {"answer": "B", "category": "math", "l2-category": "geometry"},
    "OCRBench": lambda n: {"answer": "['2']", "category": "Regular Text Recognition"},
}


def write_data(folder: Path) -> None:
    """Writes NAME.tsv for each benchmark."""
    for name in SCHEMAS:
        write_table(folder / f"{name}.tsv", records(name))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def write_geometry(folder: Path, problems: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """Writes `count` other problems of handwritten geometry into each schema, and returns them; options are near."""
    import pyarrow.parquet

    rows = itertools.cycle(pyarrow.parquet.read_table(problems).to_pylist())
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in sorted(SCHEMAS.keys() - {"WeMath", "HallusionBench"}):  # by rules a letter, and yes or no
        table = tables[name] = []
        for number, problem in zip(range(count), rows, strict=False):
            row = {"index": number, "image": base64.b64encode(problem["images"][0]["bytes"]).decode(), "question": ""}
            row |= SCHEMAS[name](number % 5)
            row["question"] = problem["problem"].removeprefix("<image>")
            row["answer"] = f"[{problem['answer']!r}]" if name == "OCRBench" else problem["answer"]
            if "A" in row:
                right = number % 4
                row |= {letter: int(problem["answer"]) + place - right for place, letter in enumerate("ABCD")}
                row["answer"] = "ABCD"[right]
            table.append(row)
        write_table(folder / f"{name}.tsv", table)
    return tables


@contextmanager
def chat_server(reply: Reply, *, model: str = "m") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A small OpenAI-compatible server; yields its URL and the bodies that it was sent, in order."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {}, json.dumps({"data": [{"id": model}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = reply(body)
            bodies.append(body)
            message = {"role": "assistant", "content": content}
            whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            self._send(*(content if isinstance(content, tuple) else (200, {}, json.dumps(whole).encode())))

        def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """The bodies are kept instead."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed is the test's business."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    write_geometry(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
