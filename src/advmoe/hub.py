"""Files of networks on the Hugging Face hub, through the library huggingface_hub (extra `hub`)."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from advmoe.errors import UserError, reason_of
from advmoe.quiet import quiet

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
REASONS = {  # name of the library's error -> message; of an error's classes the most specific one that is listed counts
    "LocalEntryNotFoundError": "the hub cannot be reached, or HF_HUB_OFFLINE is set, and the network is not in the local cache",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "GatedRepoError": "access must be requested: ask for it on the repository's page, then log in with: hf auth login",
    "RepositoryNotFoundError": "the hub has no repository of that name, or it is private: log in with: hf auth login",
    "RevisionNotFoundError": "the repository has no such revision",
    "EntryNotFoundError": "the repository exists but has no such file: it contains no network of advmoe",
}


def is_name(text: str) -> bool:
    """Whether `text` is of the form owner/name."""
    return NAME.fullmatch(text) is not None


def fetch(name: str, file: str, revision: str | None = None) -> Path:
    """A file of the repository `name`, in the library's cache. Raises UserError if it cannot be downloaded."""
    library = _library(name)
    try:
        # before `quiet`: this attribute imports a module that sets the logger's level
        download = library.hf_hub_download
        with quiet("huggingface_hub"):  # it logs every attempt; here the outcome is reported in one line
            reachable = _is_reachable(library, library.hf_hub_url(name, file, revision=revision))
            return Path(download(name, file, revision=revision, local_files_only=not reachable))
    except Exception as error:  # the library uses many others, and raises their exceptions
        raise UserError(f"{name}: no such file or folder, and it cannot be downloaded from the hub ({_reason(error)})") from None


def _is_reachable(library: Any, address: str) -> bool:
    """Whether the hub answers one request for `address`, if only with an error. A download would ask an unreachable hub seven
    times, for up to a minute each."""
    try:
        library.get_hf_file_metadata(address)
    except Exception as error:  # those of the library, and those of the HTTP client that its version uses
        return any(kind.__name__ == "HfHubHTTPError" for kind in type(error).__mro__)
    return True


def publish(folder: Path, name: str, private: bool) -> str:
    """Upload the files of `folder` to the repository `name`, which is created if it does not exist; return its address.

    Raises UserError if the hub refuses or cannot be reached, and for a public repository if `private` is true.
    """
    library = _library(name)
    try:
        address = library.create_repo(name, private=private, exist_ok=True)
        if private and not library.model_info(name).private:  # create_repo does not change an existing repository
            raise UserError(f"{name}: exists on the hub and is public; give another name, or make it private there")
        library.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Network, configuration, Record and card")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: could not be written to the hub ({_reason(error)})") from None
    return str(address)


def _reason(error: Exception) -> str:
    known = next((REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in REASONS), None)
    return known or reason_of(error, named=True)


def _library(name: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise UserError(f"{name}: no such file or folder, and the hub needs the extra hub: pip install 'advmoe[hub]'") from None
