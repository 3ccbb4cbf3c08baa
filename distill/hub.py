"""Uploads of a student to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..samplers.errors import InputError
from .export import PLAN_FILE

_UPLOADED = (
    "*README.md",
    "plan*.json",
    "*adapter_config.json",
    "*/config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "validation/*.png",
    "losses.png",
)
"What an export writes, in its folder and in those of networks and of further students; and pictures."

_TOKEN = re.compile(r"(--hub_token[= ])\S+")

_KEPT = ("checkpoint-*", "cache/*", "logs/*", ".*", "*/.*")


def refuse_logged_token(token: str | None, report_to: str) -> None:
    """Refuses a token of the hub in a run whose options a tracker uploads, as diffusers' scripts do.

    Raises:
        InputError: when it would be logged.
    """
    if token is not None and {"wandb", "all"} & set(report_to.split(",")):
        raise InputError(
            f"--hub_token would be logged by --report_to {report_to}; log in with `hf auth login` and leave it out"
        )


def without_token(command: str) -> str:
    """A command line whose ``--hub_token`` nobody can read."""
    return _TOKEN.sub(r"\1...", command)


def push_to_hub(folder: Path, repo_id: str, token: str | None = None, private: bool = False) -> str:
    """Uploads an exported student, with its plans, card and pictures; checkpoints and caches stay here.

    Args:
        folder: of the export.
        repo_id: ``USER/NAME``; made when it is not there.
        token: of the hub; None for the one of ``hf auth login``.
        private: whether a repository that is made is private.

    Returns:
        Its address.

    Raises:
        InputError: when there is no student in the folder, or the hub refuses.
    """
    if not (folder / PLAN_FILE).is_file():
        raise InputError(f"{folder} holds no {PLAN_FILE}; give the folder of an exported student")
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=list(_UPLOADED),
            ignore_patterns=list(_KEPT),
            commit_message="A student of fewstep",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{repo_id} cannot be uploaded: {' '.join(str(error).split())[:300]}") from error
    return str(made)
