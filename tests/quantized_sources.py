"""Checkpoints as others quantize them: FP8 in blocks and gpt-oss's MXFP4, by plain loops or of random bytes."""

import json
from pathlib import Path

import torch
from families import tiny_model
from safetensors.torch import load_file, save_file

from moe_compress.model import MoEModel


def edit(folder: Path, quantization: dict, change) -> Path:
    """Put a `quantization_config` into config.json, and what `change` makes of the tensors into one file."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {n: t.clone() for n, t in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, folder / "model.safetensors")
    return folder


def dense_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the package sees it."""
    source = MoEModel.open(folder, dequantize=True).source
    return {name: source.get(name).clone() for name in source.tensors}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name and "lm_head" not in name and ".gate.weight" not in name


def to_fp8(tensors, size, scales="block"):
    """Every linear layer in 8-bit floats with one scale per block, by plain loops."""
    found = {}
    for name, tensor in tensors.items():
        if not is_linear(name, tensor):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        height, width = (rows, columns) if scales == "tensor" else size
        grid = torch.empty(-(-rows // height), -(-columns // width))
        coded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
                grid[i, j] = tensor[part].float().abs().max() / 448
                coded[part] = (tensor[part].float() / grid[i, j]).to(torch.float8_e4m3fn)
        found[name], found[f"{name}_scale_inv"] = coded, grid[0, 0].clone() if scales == "tensor" else grid
    return found


def fp8_config(size):
    return {"quant_method": "fp8", "weight_block_size": size, "activation_scheme": "dynamic", "fmt": "e4m3"}


def mxfp4_checkpoint(folder: Path) -> Path:
    """gpt-oss's own layout, random bytes; sides are whole groups."""
    tiny_model("gpt_oss", hidden_size=32, intermediate_size=64).to(torch.bfloat16).save_pretrained(folder)

    def packed(tensors):
        found = {}
        torch.manual_seed(1)
        for name, tensor in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                found[name] = tensor
                continue
            experts, columns, rows = tensor.shape
            found[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            found[f"{name}_scales"] = torch.randint(120, 127, (experts, rows, columns // 32), dtype=torch.uint8)
        return found

    return edit(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, packed)


def described(folder: Path, quantization) -> Path:
    """The folder with that `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder
