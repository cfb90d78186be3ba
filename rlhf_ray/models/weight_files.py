"""Where a model's weights lie."""

from pathlib import Path

from huggingface_hub import snapshot_download

from rlhf_ray.errors import DataError


def safetensors_files(model: str) -> list[Path]:
    """The safetensors files of a local folder or of a cached hub model.

    Raises:
        DataError: there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{model} holds no *.safetensors file; save the model with safetensors")
    return files
