"""Checkpoints as others quantize them: FP8 in blocks and gpt-oss's MXFP4, by plain loops or of random bytes, and
compressed-tensors by its library."""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
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


# --- compressed-tensors --------------------------------------------------------------------------------------------


def ct_config(groups: dict[str, tuple[list[str], str, QuantizationArgs]], ignored: list[str] = ()) -> dict:
    """A `quantization_config` as llm-compressor writes it: name of a group → targets, format, weights."""
    formats = {form for _, form, _ in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": ["lm_head", r"re:.*mlp\.gate$", *ignored],
        "config_groups": {
            name: {"targets": targets, "format": form, "weights": arguments.model_dump(mode="json")}
            for name, (targets, form, arguments) in groups.items()
        },
    }


def by_library(config, group_of, expected):
    """A change for `edit`: linear layers as the library compresses them.

    `group_of`: path of a module → its group, None for a dense one. `expected`: gets what the library reads, by name.
    """

    def compressed(tensors):
        found = {}
        for full, tensor in tensors.items():
            module = full.removesuffix(".weight")
            group = group_of(module) if is_linear(full, tensor) else None
            if group is None:
                found[full] = tensor
                continue
            values = config["config_groups"][group]
            arguments = QuantizationArgs(**values["weights"])
            scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=values["format"])
            compressor = BaseCompressor.get_value_from_registry(values["format"])
            scale, zero = scales_of(tensor, arguments)
            parts = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero}
            written = compressor.compress({k: v.clone() for k, v in parts.items()}, scheme)
            if arguments.symmetric:
                written.pop("weight_zero_point", None)
            found |= {f"{module}.{leaf}": value for leaf, value in written.items()}
            expected[full] = compressor.decompress({k: v.clone() for k, v in written.items()}, scheme)["weight"]
        return found

    return compressed


def scales_of(weight, arguments):
    """Scale and zero point as the library computes them, of extremes found here."""
    rows, columns = weight.shape
    width = arguments.group_size if arguments.strategy == "group" else columns
    height = rows if arguments.strategy == "tensor" else 1
    if arguments.strategy == "block":
        height, width = arguments.block_structure
    tiles = weight.reshape(rows // height, height, columns // width, width)
    scale, zero = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), arguments)
    return (scale.reshape(1), zero.reshape(1)) if arguments.strategy == "tensor" else (scale, zero)
