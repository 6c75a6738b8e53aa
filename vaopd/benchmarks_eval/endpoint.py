"""Asks an OpenAI-compatible endpoint for answers, and serves a checkpoint with vLLM's own server."""

from __future__ import annotations

import base64
import mimetypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from vaopd.benchmarks_eval.answers import Question
from vaopd.errors import Busy, InvalidInput, NotFound, Unavailable
from vaopd.http_client import NO_PROXY, check_url, make_headers, read_retry_after
from vaopd.launch.supervisor import Child, Supervisor
from vaopd.net.backoff import Backoff
from vaopd.net.ports import LOOPBACK, free_port, join_address

SERVER = "vllm"
START_TIMEOUT_S = 1800.0
ANSWER_TIMEOUT_S = 3600.0
PATIENCE_S = 300.0
"""How long an endpoint that is away or busy is asked again."""


class OpenAIEndpoint:
    """Samples one answer a request at temperature 1 and top-p 1. Threads may share it; the caller closes `http`."""

    def __init__(self, url: str, *, model: str | None, max_tokens: int, api_key: str | None) -> None:
        """url: up to /v1. model: its name there; None takes the only one.

        Raises NotFound for a model that it doesn't have, Unavailable if it doesn't answer.
        """
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.Client(
            base_url=check_url(url).rstrip("/"),
            headers=make_headers(api_key or None),
            timeout=ANSWER_TIMEOUT_S,
            limits=limits,
            mounts=NO_PROXY,
        )
        self._url = url
        listed = self._send("GET", "/models")
        try:
            names = [str(entry["id"]) for entry in listed["data"]]
        except (KeyError, TypeError):
            raise InvalidInput(f"{url} sent no list of models: {str(listed)[:200]}; give the URL up to /v1") from None
        if (model is None and len(names) != 1) or (model is not None and model not in names):
            raise NotFound(f"{url} serves {', '.join(names) or 'no model'}; choose one with --model, not {model!r}")
        fixed = {"temperature": 1.0, "top_p": 1.0, "n": 1, "max_tokens": max_tokens}
        self._body = {"model": model or names[0], **fixed}

    def ask(self, question: Question, seed: int) -> tuple[str, bool]:
        """Returns the answer's text and whether it was cut off. Raises InvalidInput for a refused question."""
        try:
            content = [_encode(part) for part in question.parts]
        except OSError as error:
            raise NotFound(
                f"question {question.id!r}: {error}; delete its questions.jsonl to export it again"
            ) from None
        body = self._body | {"messages": [{"role": "user", "content": content}], "seed": seed}
        reply = self._send("POST", "/chat/completions", body, about=f"question {question.id!r}: ")
        try:
            choice = reply["choices"][0]
            text, cut_off = choice["message"]["content"], choice["finish_reason"] == "length"
            if text is None or isinstance(text, str):
                return text or "", cut_off
        except (KeyError, IndexError, TypeError):
            pass
        raise InvalidInput(f"{self._url} sent no text for question {question.id!r}: {str(reply)[:200]}")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None, *, about: str = "") -> Any:
        backoff = Backoff(PATIENCE_S, longest_s=10.0)
        while True:
            try:
                return _read(self.http.request(method, path, json=body), about)
            except httpx.TransportError as error:
                lost = Unavailable(f"{self._url} can't be reached ({error or type(error).__name__}); run it again")
                time.sleep(backoff.delay_s(lost))
            except (Busy, Unavailable) as refused:
                time.sleep(backoff.delay_s(refused))


@contextmanager
def serve(model: str, *, name: str, logs: Path, say: Callable[[str], None]) -> Iterator[tuple[str, Supervisor]]:
    """Serves a checkpoint while the block runs; yields its URL and what has to be checked while it is used.

    Raises ChildFailed, with the end of its log, if the server doesn't start.
    """
    port = free_port()
    url = f"http://{join_address(LOOPBACK, port)}"
    argv = (sys.executable, "-m", "vaopd.benchmarks_eval.serve_vllm", model, str(port), name)
    child = Child(name=SERVER, argv=argv, is_ready=lambda: _is_healthy(url), restarts=2)
    with Supervisor(logs=logs, say=say) as supervisor:
        supervisor.start(child)
        supervisor.wait_ready(SERVER, timeout_s=START_TIMEOUT_S)
        yield f"{url}/v1", supervisor


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _read(answer: httpx.Response, about: str) -> Any:
    if answer.is_success:
        try:
            return answer.json()
        except ValueError:
            raise InvalidInput(
                f"{about}{answer.url} sent no JSON: {answer.text[:200]!r}; give the URL up to /v1"
            ) from None
    message = f"{about}the endpoint answered {answer.status_code}: {answer.text[:300]}"
    if answer.status_code == 429:
        raise Busy(message, read_retry_after(answer.headers.get("Retry-After", "")))
    raise (Unavailable if answer.status_code >= 500 else InvalidInput)(message)


def _encode(part: dict[str, str]) -> dict[str, Any]:
    """Encodes a part of a prompt; images become data URLs with the file's own bytes.

    >>> _encode({"type": "text", "value": "How many?"})
    {'type': 'text', 'text': 'How many?'}
    """
    if part["type"] == "text":
        return {"type": "text", "text": part["value"]}
    kind = mimetypes.guess_type(part["value"])[0] or "image/png"
    content = base64.b64encode(Path(part["value"]).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{content}"}}
