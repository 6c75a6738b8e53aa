"""`vaopd push RUN HUB_ID`: publishes a run's model, with its card, on the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit, say
from vaopd.errors import ConfigError
from vaopd.files.hub import is_hub_id

WEIGHTS, CARD = "*.safetensors", "README.md"


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd push`."""
    push = subparsers.add_parser("push", help="publish a run's model on the Hugging Face hub")
    push.add_argument("run", metavar="RUN", type=Path, help="a run's folder, e.g. runs/first")
    push.add_argument("hub_id", metavar="HUB_ID", help="where to, e.g. YOUR_NAME/my-student")
    push.add_argument(
        "--which", choices=("model", "best"), default="model", help="after the last step, or the best evaluation"
    )
    push.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    push.add_argument("--message", help="the commit's message")
    push.add_argument("--dry-run", action="store_true", help="check, and list what would be sent; needs no network")
    push.set_defaults(command=_push, extra="model")


def _push(arguments: argparse.Namespace) -> int:
    folder = arguments.run / arguments.which
    if not is_hub_id(arguments.hub_id):
        raise ConfigError(f"HUB_ID {arguments.hub_id!r} is not of the form NAME/MODEL")
    files = _list_files(folder)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        emit(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}")
    missing = "license:" not in (folder / CARD).read_text(encoding="utf-8").partition("\n---")[0]
    if missing:
        say(f"{folder / CARD} names no licence; complete `license` at its top before you publish it")
    where = f"https://huggingface.co/{arguments.hub_id}"
    if arguments.dry_run:
        emit(f"{len(files)} files, {size:,} bytes, would go to {where}; nothing was sent")
        return 0
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise ConfigError("no token for the hub is set; `hf auth login` asks for one, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(arguments.hub_id, private=not arguments.public, exist_ok=True)
        api.upload_folder(
            repo_id=arguments.hub_id,
            folder_path=folder,
            commit_message=arguments.message or f"{arguments.run.resolve().name}, {arguments.which}, by vaopd",
        )
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"{where} took nothing ({str(error).partition(chr(10))[0]}); check id, token and network"
        ) from None
    emit(where)
    return 0


def _list_files(folder: Path) -> list[Path]:
    """Returns the files of a saved model. Raises ConfigError where weights or the card are missing."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} doesn't exist: a run leaves model/ after its last step and best/ after an evaluation"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for name in ("config.json", CARD, WEIGHTS):
        if not any(path.match(name) for path in files):
            raise ConfigError(f"{folder} has no {name}, so it isn't the model of a finished run")
    return files
