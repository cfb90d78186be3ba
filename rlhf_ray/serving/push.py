"""Upload an exported folder to a model hub, with the token of the environment."""

import os
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from rlhf_ray.errors import ConfigError

TOKEN = "HF_TOKEN"


def files_of(folder: Path) -> dict[str, int]:
    """Return what would be uploaded: path below the folder -> bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder's files as one commit of a repository, which is made where there is none.

    Args:
        folder: an export.
        name: ``owner/name`` on the hub.
        private: whether a repository that is made is private.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: no token, a wrong name, a refusal by the hub, or no answer from it.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise ConfigError(
            f"--push needs a token that may write, in the environment variable {TOKEN}; the "
            f"export itself is in {folder}"
        )
    api = HfApi(token=token)
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of rlhf-ray")
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The hub did not take {name} ({reason}); the export itself is in {folder}. Check the "
            f"name, what the token in {TOKEN} may write, and the network, then export again"
        ) from None
    return str(made)
