"""A tiny random vision-language checkpoint with tokenizer and image processor, and files with images. No download.

The tokenizer has a token per printable ASCII character (id 3 and up) and the family's placeholders from 120 on.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
from families import FIRST_PLACEHOLDER, tiny_model
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PLACEHOLDERS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}"
)


def seeing_checkpoint(folder: Path, name: str = "qwen3_vl_moe") -> Path:
    """Sides of images are multiples of 8, and 8·8 pixels become a token."""
    tiny_model(name).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(32 + i): 3 + i for i in range(95)}
    inner = Tokenizer(models.WordLevel(vocabulary | {p: FIRST_PLACEHOLDER + i for i, p in enumerate(PLACEHOLDERS)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=PLACEHOLDERS,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    classes = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**classes, **sizes, **limits}))
    return folder


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """As a file's bytes."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def pictures(folder: Path) -> Path:
    """rows.jsonl with images beside it, of several sizes, one row with two, one with none, one within the row."""
    (folder / "img").mkdir(parents=True)
    rows = []
    for i in range(6):
        picture(16 + 8 * (i % 3), 24, i).save(folder / "img" / f"{i}.png")
        rows.append({"text": f"what is number {i}?", "image": f"img/{i}.png"})
    rows.append({"text": "which of the two", "image": ["img/0.png", "img/4.png"]})
    rows.append({"text": "no image here", "image": None})
    uri = "data:image/png;base64," + base64.b64encode(png(picture(16, 16, 9))).decode()
    rows.append({"text": [{"role": "user", "content": "inside"}, {"role": "assistant", "content": "ok"}], "image": uri})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"plain text {i} " * 4}) + "\n" for i in range(12)))
    return folder
