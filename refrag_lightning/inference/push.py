"""Sending an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path


def check_name(name: str) -> None:
    """Refuses what cannot be a repository's name, before anything is computed for it.

    Raises:
        ValueError: If `name` is not of the form `name` or `owner/name`.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"push_to_hub ({name!r}) must be a name on the Hub, OWNER/NAME: {error}"
        ) from error


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder to a model repository of the Hub, which is made if there is none.

    Args:
        folder: The folder; all of it is uploaded.
        name: The repository, `owner/name`; without an owner that of the account.
        private: Whether a new repository is private. An existing public one is refused then, since
            the Hub leaves a repository's visibility as it is.

    Returns:
        The repository's address.

    Raises:
        OSError: If the Hub cannot be reached, or refuses.
        ValueError: If `private`, and there is a public repository of this name.
    """
    import huggingface_hub

    try:
        address = huggingface_hub.create_repo(name, private=private, exist_ok=True)
        found = huggingface_hub.model_info(address.repo_id)
    except Exception as error:  # of httpx, of the Hub, or that no token is there
        raise _failed(name, error) from error
    if private and not found.private:
        raise ValueError(
            f"{address} is there already and public: give --private false to send to it anyway, "
            "or another name"
        )
    try:
        huggingface_hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Export of refrag_lightning",
        )
    except Exception as error:
        raise _failed(name, error) from error
    return str(address)


def _failed(name: str, error: Exception) -> OSError:
    reason = " ".join((str(error) or type(error).__name__).split())[:300]
    return OSError(f"{name} could not be sent to the Hub: {reason}")
