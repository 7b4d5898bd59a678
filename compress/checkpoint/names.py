"""What a user calls a checkpoint: a folder, or the name on the Hugging Face Hub of one that the local cache holds."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def local_folder(name: str | os.PathLike[str]) -> str:
    """The folder: as given, or the newest snapshot that was downloaded under this name. Nothing is downloaded.

    A name that neither is is returned as it is, for whoever opens it to refuse (`remedy`).
    """
    path = os.path.expanduser(os.fspath(name))
    if os.path.exists(path) or not _ON_THE_HUB.fullmatch(path):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(path, local_files_only=True)
    except LocalEntryNotFoundError:
        return path


def remedy(name: str) -> str:
    """What to do about a folder that isn't there, as the end of a message."""
    return f"; if that is a model on the Hub, download it: hf download {name}" if _ON_THE_HUB.fullmatch(name) else ""


ModelPath = Annotated[str, AfterValidator(local_folder)]
