"""Patches on the Hugging Face hub: a repository's folder here, and a folder as a repository."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thought_kernels.patches.card import CARD_FILE, is_ours, is_sealed
from thought_kernels.patches.storage import RECORD_FILE, TENSOR_FILE

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def fetched(directory: str | os.PathLike[str], revision: str | None, *, offline: bool = False) -> Path:
    """The folder of a patch: the one that is named, or that of the repository "owner/name", fetched where none is here.

    Raises:
        ValueError: a repository that cannot be had, or a revision of a folder here.
    """
    path, name = Path(directory), os.fspath(directory)
    if path.exists() or not _REPOSITORY.fullmatch(name):
        if revision is not None:
            raise ValueError(f"from_pretrained: revision must be None for a folder here, got {revision!r}")
        return path
    hub = _hub("from_pretrained")
    try:
        found = hub.snapshot_download(
            name, revision=revision, allow_patterns=[TENSOR_FILE, RECORD_FILE], local_files_only=offline
        )
    except Exception as error:  # the hub's client raises types of its own and of the libraries below it
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"from_pretrained: directory must be a patch's folder or repository, got {name!r}, where no folder is; "
            f"as a repository: {reason}"
        ) from error
    return Path(found)


def push(
    repository: str,
    write: Callable[[Path], Any],
    *,
    card: str | None,
    private: bool | None,
    token: str | bool | None,
    message: str | None,
) -> str:
    """Makes a repository if there is none and uploads a patch's three files in one commit.

    Args:
        repository: "owner/name".
        write: writes them to a folder.
        card: what takes the written card's place. A card there that somebody wrote or changed is left alone, unless
            this one is somebody's too.
        private: of a new repository, None for the owner's default.
        token: as huggingface_hub takes it.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ValueError: a name that is no repository's, or without huggingface_hub.
    """
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"push_to_hub: repository must be 'owner/name', got {repository!r}")
    api = _hub("push_to_hub").HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))  # all refusals come before anything is made there
        address = api.create_repo(repository, private=private, exist_ok=True)
        names = [TENSOR_FILE, RECORD_FILE]
        if card is not None:
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
        own = card is not None and not is_sealed(card)  # somebody's words
        if (
            own
            or not api.file_exists(repository, CARD_FILE)
            or is_ours(Path(api.hf_hub_download(repository, CARD_FILE)))
        ):
            names.append(CARD_FILE)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
            commit_message=message or "Upload a thought patch",
        )
    return str(address)


def _hub(function: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{function}: huggingface_hub must be installed for the hub, got none; pip install 'thought_kernels[hf]'"
        ) from error
    return huggingface_hub
