"""Loading a folder as its users do, in float32, and the packed experts of what was loaded."""

import torch
from transformers import AutoConfig

from moe_compress.model import hf


def from_pretrained(folder, **options):
    cls = hf.model_class(AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def experts_of(model):
    """Path → packed experts module."""
    return {p: m for p, m in model.named_modules() if getattr(m, "kind", "") == "packed"}
