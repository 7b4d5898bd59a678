"""Documents with images, as the arguments that the checkpoint's own processor makes of them.

The promise: what is padded, resized or replaced is the processor's doing alone; each document is one forward by itself;
which tokens are of images is what the processor says. Images are opened when their document's turn comes, and one that
can't be is a `DataError` that names file and line.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_compress.errors import DataError, InputError
from moe_compress.model import hf
from moe_compress.model.sweep import MODALITY

if TYPE_CHECKING:
    from .reading import Document

NEEDED = "images need pillow: pip install 'moe-compress[vision]'"


def find_processor(folder: str | Path) -> Any:
    """The processor of a checkpoint folder. Raises InputError where it has none, or what it needs isn't installed."""
    try:
        found = hf.load_processor(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder} has no processor that can be loaded, and `image_field` needs it: {reason}"
        ) from error
    if not hasattr(found, "image_processor"):
        raise InputError(f"{folder} has no image processor (preprocessor_config.json), and `image_field` needs it")
    return found


def found_images(value: Any, where: str, folder: Path) -> tuple[Any, ...]:
    """What a row's image field holds, as paths, bytes or pillow's images: one, a list of them, or nothing.

    A text is a path relative to `folder`, or a data URI; an object has `bytes` or `path`, as data sets store images.
    """
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(image for item in value for image in found_images(item, where, folder))
    if isinstance(value, Mapping):
        held = value.get("bytes")
        return found_images(held if held is not None else value.get("path"), where, folder)
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return (value,)
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return (base64.b64decode(value.partition(";base64,")[2], validate=True),)
        except ValueError as error:
            raise DataError(f"{where}: the image's data URI isn't base64: {error}") from None
    if isinstance(value, str):
        return (folder / value,)
    raise DataError(f"{where}: an image is a path, bytes, or a data URI (data:image/png;base64,…), not {value!r:.80}")


class ImageReader:
    """Makes forward arguments of documents with images.

    Args:
        processor: the checkpoint's.
        length: tokens at the most.
    """

    def __init__(self, processor: Any, length: int):
        self.processor, self.length = processor, length

    @property
    def names(self) -> dict[str, str]:
        """Classes that prepare text and images: other versions of them make other pixels."""
        parts = {"processor": self.processor, "image_processor": self.processor.image_processor}
        return {name: type(part).__name__ for name, part in parts.items()}

    def sample(self, document: Document) -> dict[str, Tensor] | None:
        """`input_ids` [1, s] first, then whatever else the model's forward takes, and `MODALITY` [1, s].

        Text behind the last image is cut at `length` tokens; None if the images alone go beyond it.
        """
        images = [_opened(image, document.where) for image in document.images]
        text = self._prompt(document, len(images))
        try:
            made = self.processor(text=[text], images=images, return_tensors="pt")
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError) as error:
            raise DataError(
                f"{document.where}: the processor refuses it: {' '.join(str(error).split())[:300]}"
            ) from error
        ids = made["input_ids"]
        modality = made.get("mm_token_type_ids")
        if modality is None:
            modality = (ids == self._image_token()).long()
        if not bool((modality == 1).any()):
            raise DataError(f"{document.where}: no token of the processor's output stands for its images")
        arguments = {"input_ids": ids, **{k: v for k, v in made.items() if isinstance(v, Tensor)}, MODALITY: modality}
        if ids.shape[1] > self.length:
            if bool((modality[:, self.length :] != 0).any()):
                return None
            arguments = {k: v[:, : self.length] if v.shape[:2] == ids.shape else v for k, v in arguments.items()}
        if bool((arguments.get("attention_mask", torch.ones(1)) == 1).all()):
            arguments.pop("attention_mask", None)  # nothing is padded
        return arguments

    def _image_token(self) -> int:
        token = getattr(self.processor, "image_token_id", None)
        if token is None:
            raise InputError(f"{type(self.processor).__name__} doesn't say which tokens stand for images")
        return int(token)

    def _prompt(self, document: Document, images: int) -> str:
        """The text with a placeholder for every image.

        Text that has placeholders is taken as it is. Other text, and messages without images, get the images in front:
        of the first message of a user, by the chat template; without a template, placeholders and the text.
        """
        value, token = document.value, getattr(self.processor, "image_token", None)
        if isinstance(value, str):
            if token is not None and token in value:
                return value
            if not self.processor.chat_template:
                if token is None:
                    raise DataError(f"{document.where}: the processor has neither an image token nor a chat template")
                return str(token) * images + value
            value = [{"role": "user", "content": value}]
        if not self.processor.chat_template:
            raise DataError(f"{document.where}: messages, but the processor has no chat template to apply to them")
        from jinja2 import TemplateError

        try:
            return str(self.processor.apply_chat_template(_with_images(value, images), tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{document.where}: the chat template refuses these messages: {reason}") from error


def _with_images(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts; where none is an image, `images` in front of the first user's."""
    found = [
        {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]}
        for m in messages
    ]
    if not any(part.get("type") == "image" for message in found for part in message["content"]):
        first = next((m for m in found if m["role"] == "user"), found[0])
        first["content"] = [{"type": "image"}] * images + list(first["content"])
    return found


def _opened(image: Any, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(NEEDED) from error
    if hasattr(image, "convert"):
        return image.convert("RGB")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: image can't be opened: {' '.join(str(error).split())[:200]}") from error
