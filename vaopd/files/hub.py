"""Finds a model by its folder or its hub id."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vaopd.errors import NotFound

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here can be a hub id: ORG/NAME, and ORG is no folder here either."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).parent.exists()


def no_folder(name: str) -> str:
    """Returns that there is no such folder and, for a relative path, where it was looked for."""
    return "no such folder" + ("" if Path(name).is_absolute() else f" in {Path.cwd()}, where the command runs")


def model_folder(name: str, *, role: str) -> Path:
    """Returns the folder of a model, downloading a hub id first.

    role: the model's part in messages, such as "student". Raises NotFound when it is in neither place.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the hub's cache: no room, or no right to write there
            raise
        raise NotFound(f"{role} {name!r} is no folder here and can't be had from the hub; give a folder") from None


def find_file(name: str, file: str) -> Path | None:
    """Returns the place of a model's file, in its folder or in the hub's cache; None for a hub id without it there."""
    if not is_hub_id(name) or Path(name).is_dir():
        return Path(name) / file
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def read_control_tokens(name: str) -> list[str]:
    """Reads the special tokens of a model's tokenizer as texts; none for a hub id that was not downloaded yet."""
    if (file := find_file(name, "tokenizer.json")) is None:
        return []
    try:
        added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
        return [token["content"] for token in added if token["special"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or another format
        return []
