"""Files of networks on the Hugging Face hub, through the library huggingface_hub (extra `hub`)."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from advmoe.errors import UserError
from advmoe.quiet import quiet

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
REASONS = {  # the library's errors by name -> in our words; the most particular class that is listed counts
    "LocalEntryNotFoundError": "the hub cannot be reached, and the network is not in the local cache",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the network is not in the local cache",
    "GatedRepoError": "its owner gives access on request: ask for it on its page, then log in with: hf auth login",
    "RepositoryNotFoundError": "the hub has none of that name, or it is private: log in with: hf auth login",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "EntryNotFoundError": "there is such a repository, but without that file: no network of advmoe",
}


def is_name(text: str) -> bool:
    """Whether `text` is of the form owner/name."""
    return NAME.fullmatch(text) is not None


def fetch(name: str, file: str, revision: str | None = None) -> Path:
    """A file of the repository `name`, in the library's cache. Raises UserError where it cannot be downloaded."""
    library = _library(name)
    try:
        download = library.hf_hub_download  # imported now, which sets how much the library says
        with quiet("huggingface_hub"):  # it prints a line for every try; the outcome is reported in one line
            return Path(download(name, file, revision=revision))
    except Exception as error:  # the library stands on many others, and raises theirs
        raise UserError(f"{name}: no such file or folder, and it cannot be downloaded from the hub ({_reason(error)})") from None


def publish(folder: Path, name: str, private: bool) -> str:
    """Put the files of `folder` into the repository `name`, which is made if need be; its address. Raises UserError."""
    library = _library(name)
    try:
        address = library.create_repo(name, private=private, exist_ok=True)
        library.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Network, configuration, Record and card")
    except Exception as error:
        raise UserError(f"{name}: could not be written to the hub ({_reason(error)})") from None
    return str(address)


def _reason(error: Exception) -> str:
    known = next((REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in REASONS), None)
    return known or " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _library(name: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise UserError(f"{name}: no such file or folder, and the hub needs the extra hub: pip install 'advmoe[hub]'") from None
