"""Folders to repositories of the Hugging Face hub, by its own client: its token, its retries, one commit."""

from __future__ import annotations

import string
from pathlib import Path

from minimax_jax.errors import JobError, Problem, saying

_SCHEME = "hf://"
_EXPECTED = "hf://org/name"
_PLAIN = string.ascii_letters + string.digits + "-_."


def repository_of(url: str) -> str:
    """The `org/name` of `hf://org/name`.

    Raises:
        JobError: it is of another form; uploads go to the main branch of a whole repository.
    """
    name = url.removeprefix(_SCHEME)
    steps = name.split("/")
    if not url.startswith(_SCHEME) or len(steps) != 2 or not all(steps) or any(mark in name for mark in "@?#"):
        raise JobError(Problem(what="not a repository to upload to", expected=_EXPECTED, got=url))
    return name


def is_repository(name: str) -> bool:
    """Whether text has the form `org/name`, of letters, digits, and `-_.` alone."""
    steps = name.split("/")
    return len(steps) == 2 and all(steps) and not name.strip(_PLAIN + "/")


def require_repository(repository: str) -> None:
    """Check that the hub's client is installed, and takes the name `org/name`; nothing is asked of the hub.

    Raises:
        JobError: it is not, and the extra is named; or it does not.
    """
    try:
        from huggingface_hub import errors, utils
    except ImportError as error:
        remedy = "pip install 'minimax_jax[hub]'"
        raise JobError(Problem(what="huggingface_hub is not installed", got=str(error), remedy=remedy)) from error
    try:
        utils.validate_repo_id(repository)  # type: ignore[attr-defined] # it is exported, not by __all__
    except errors.HFValidationError as error:
        what, got = "not a name that the hub takes", f"{_SCHEME}{repository}: {error}"
        raise JobError(Problem(what=what, expected=_EXPECTED, got=got)) from error


def upload(folder: Path, repository: str, *, private: bool, message: str, remedy: str) -> str:
    """Upload a folder as one commit to a repository, which is made where it does not exist yet.

    Args:
        folder: what to upload; it stays as it is.
        repository: `org/name`.
        private: make a new repository private; one that exists stays what it is.
        message: of the commit.
        remedy: what to say when it fails.

    Returns:
        The URL of the commit.

    Raises:
        JobError: the hub refuses or cannot be reached, or its client is not installed.
    """
    require_repository(repository)
    from huggingface_hub import HfApi, errors

    broken: type[Exception] = errors.HTTPError  # type: ignore[attr-defined] # of the library that the client builds on
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (OSError, RuntimeError, ValueError, broken) as error:  # ValueError: a name or a card that it refuses
        what, got = "upload to the hub failed; the folder is whole", saying(error).splitlines()[0]
        raise JobError(Problem(what=what, file=f"{_SCHEME}{repository}", got=got, remedy=remedy)) from error
    return str(done.commit_url)
