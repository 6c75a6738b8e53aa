"""Serves a run's snapshots over HTTP, for workers that don't see the trainer's files.

    GET URL                    names and sizes of the snapshot's files
    GET URL/files/NAME         a file, whole or in ranges
    GET URL/delta/SHA256/NAME  what turns that file of the weights with that digest into this one; 404: take the file

The address of a snapshot, with a secret of this process in it, is its path in the queue: who reads the queue may read
the weights. It is plain HTTP, for a network that is trusted as the queue's is.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import threading
from dataclasses import replace
from pathlib import Path

import uvicorn
from safetensors import SafetensorError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from vaopd.errors import ConfigError
from vaopd.types import PolicyVersion
from vaopd.weights.delta import write_delta

log = logging.getLogger(__name__)


class SnapshotServer:
    """Serves the snapshots that it was given, as long as their folders exist, on a thread of its own."""

    def __init__(self, address: str) -> None:
        """Listens on host:port, by which workers reach it; port 0 takes a free one. Raises ConfigError."""
        host, _, port = address.rpartition(":")
        try:
            family, _, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            if ipaddress.ip_address(place[0]).is_unspecified:
                raise OSError("workers connect to it, and it stands for every host")
            listener = socket.create_server(place[:2], family=family, backlog=128)
        except OSError as error:
            problem = f"weights.address {address!r} can't be had here ({error}); name one of this host"
            raise ConfigError(problem) from None
        self._url = f"http://{host}:{listener.getsockname()[1]}/{secrets.token_urlsafe(16)}"
        self._prefix = self._url.rpartition("/")[2]
        self._folders: dict[str, Path] = {}  # by the digest of the weights
        self._making_delta = threading.Lock()
        routes = [
            Route("/{secret}/{digest}", self._list_files),
            Route("/{secret}/{digest}/files/{name}", self._send_file),
            Route("/{secret}/{digest}/delta/{base}/{name}", self._send_delta),
        ]
        settings = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="snapshots", daemon=True)
        self._thread.start()

    def offer(self, policy: PolicyVersion) -> PolicyVersion:
        """Serves a snapshot from now on -> the policy under the address that workers fetch it from."""
        # What was pruned is served no more, nor is it the base of a delta.
        self._folders = {digest: folder for digest, folder in self._folders.items() if folder.is_dir()}
        self._folders[policy.sha256] = Path(policy.path)
        return replace(policy, path=f"{self._url}/{policy.sha256}")

    def close(self) -> None:
        """Ends the transfers and the thread."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    # Plain functions: Starlette runs them beside each other on threads.

    def _list_files(self, request: Request) -> Response:
        folder = self._find_folder(request)
        return JSONResponse({path.name: path.stat().st_size for path in sorted(folder.iterdir())})

    def _send_file(self, request: Request) -> Response:
        return FileResponse(_find_file(self._find_folder(request), request))

    def _send_delta(self, request: Request) -> Response:
        folder, base = self._find_folder(request), self._folders.get(request.path_params["base"])
        if base is None:
            raise HTTPException(404)
        old, new = _find_file(base, request), _find_file(folder, request)
        # Beside the snapshot, where pruning removes it with the older ones.
        delta = folder.parent / f".{folder.name}.tmp-deltas" / request.path_params["base"] / new.name
        with self._making_delta:  # all workers ask for the same ones
            if not delta.exists():
                aside = delta.with_suffix(".part")
                try:
                    delta.parent.mkdir(parents=True, exist_ok=True)
                    if write_delta(old, new, aside) is None:
                        aside.touch()  # empty: not worth it, and the other workers need not wait for that again
                    aside.rename(delta)
                except (OSError, SafetensorError) as error:  # no room beside the snapshot: workers take the file
                    log.warning("%s can't be written (%s); the weights are sent whole", delta, error)
                    raise HTTPException(404) from None
        if not delta.stat().st_size:
            raise HTTPException(404)
        return FileResponse(delta)

    def _find_folder(self, request: Request) -> Path:
        folder = self._folders.get(request.path_params["digest"])
        known = secrets.compare_digest(request.path_params["secret"].encode(), self._prefix.encode())
        if not known or folder is None or not folder.is_dir():
            raise HTTPException(404)
        return folder


def _find_file(folder: Path, request: Request) -> Path:
    path = folder / Path(request.path_params["name"]).name
    if not path.is_file():
        raise HTTPException(404)
    return path
