"""Reads a native checkpoint by what docs/format.md says, and nothing else: no torch, nothing of the package.

Promise: whoever doubts the document can doubt this file; a change of the format that isn't documented breaks it.
"""

import json
import struct
from pathlib import Path

import numpy as np

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1, "U8": 1}
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def read_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name → (dtype as safetensors names it, shape, bytes)."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for file in files:
        raw = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                assert stop - start == SIZES[entry["dtype"]] * np.prod(entry["shape"], dtype=int)
                tensors[name] = (entry["dtype"], entry["shape"], raw[start:stop])
    return tensors


def as_float(dtype: str, shape: list[int], raw: bytes) -> np.ndarray:
    """Floating-point tensor as float32 (float16 and bfloat16 are exact in it)."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32).reshape(shape)


def codes_of(shape: list[int], raw: bytes, bits: float, columns: int) -> np.ndarray:
    """Rows of packed integers → rows of codes, bit by bit, or five digits to a byte."""
    if bits == 1.58:
        assert shape[-1] == -(-columns // 20)
        digits = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], 4 * shape[-1], 1) // 3 ** np.arange(6) % 3
        stream = digits.reshape(*shape[:-1], -1, 6)
        assert not stream[..., 5].any()
        codes = stream[..., :5].reshape(*shape[:-1], -1)
        assert not codes[..., columns:].any()
        return codes[..., :columns]
    assert shape[-1] == -(-columns * bits // 32)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 4 * shape[-1])  # little-endian words: a stream of bytes
    stream = np.unpackbits(rows, axis=1, bitorder="little")
    assert not stream[:, columns * bits :].any()
    per_code = stream[:, : columns * bits].reshape(len(rows), columns, bits).astype(np.int64)
    return (per_code << np.arange(bits)).sum(-1).reshape(*shape[:-1], columns)


def rotation_of(size: int, signs: str) -> np.ndarray:
    """Q, element by element."""
    block = max(b for b in (1 << m for m in range(20)) if size % b == 0)
    place = np.arange(size)
    odd = np.array([[(int(i) & int(j)).bit_count() % 2 for j in place % block] for i in place % block])
    same = place[:, None] // block == place // block
    flip = np.array([int(signs, 16) >> i & 1 for i in range(size)])
    return (1 - 2.0 * flip)[:, None] * same * (1 - 2 * odd) / block**0.5


class Native:
    """A native checkpoint folder.

    Attributes:
        config: config.json. tensors: see read_tensors. used: names of the packed tensors that were read. columns: of
        matrices beside the experts, by path; to be filled by who knows the architecture.
    """

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.quantization = self.config["quantization_config"]
        assert self.quantization["quant_method"] == "moe_compress"
        blocks = self.quantization["blocks"]
        newer = any({"neurons", "routing"} & b.keys() or b["kind"] in ("ragged", "factored") for b in blocks.values())
        newer = newer or any(f'"{key}"' in json.dumps(blocks) for key in ("low_rank", "input_rotation"))
        assert self.quantization["format_version"] == (3 if newer else 2 if "matrices" in self.quantization else 1)
        self.tensors = read_tensors(folder)
        self.used: set[str] = set()
        self.columns: dict[str, int] = {}

    def prefix(self, layer: str) -> str:
        """P of a layer."""
        return f"{self.quantization['stack']}.{layer}.{self.quantization['blocks'][layer]['experts']}."

    def packed_layers(self) -> list[str]:
        """Layers whose experts are packed."""
        return [i for i, block in self.quantization["blocks"].items() if block["kind"] == "packed"]

    def weights(self, layer: str) -> dict[str, np.ndarray]:
        """Projection → float32 [E, O, K]; bias → [E, O]."""
        block = self.quantization["blocks"][layer]
        layout = block["layout"]
        result = {}
        for name, entry in layout["projections"].items():
            shape = (block["num_experts"], entry["out_features"], entry["in_features"])
            assert len(entry["experts"]) == shape[0]
            result[name] = np.full(shape, np.nan, np.float32)
            for encoding in set(entry["experts"]):
                members = [e for e, own in enumerate(entry["experts"]) if own == encoding]
                stack = f"{self.prefix(layer)}{name}_proj.{encoding}."
                result[name][members] = self._stack(stack, layout["encodings"][encoding], encoding, shape)
            if "low_rank" in entry:
                self._add(f"{self.prefix(layer)}{name}_proj.low_rank.", entry["low_rank"], result[name])
        if "rotation" in layout:
            result["down"] = result["down"] @ rotation_of(**layout["rotation"]).T  # W from W Q
        if "input_rotation" in layout:
            inverse = rotation_of(**layout["input_rotation"]).T
            result |= {name: result[name] @ inverse for name in result if name != "down"}
        for name, dtype in layout["biases"].items():
            stored = self._take(self.prefix(layer) + name)
            assert stored[0] == STORED[dtype]
            result[name] = as_float(*stored)
        return result

    def routed(self, layer: str, index: np.ndarray, weight: np.ndarray) -> list[dict[int, float]]:
        """Per token, expert → weight, of a router's choices and weights [T, K], where the rule is `remap` alone."""
        block = self.quantization["blocks"][layer]
        (rule,) = block["routing"]
        assert rule["kind"] == "remap"
        assert len(rule["experts"]) == block.get("router_experts", block["num_experts"])
        found: list[dict[int, float]] = []
        for classes, weights in zip(index.tolist(), weight.tolist(), strict=True):
            found.append({})
            for c, w in zip(classes, weights, strict=True):
                expert = rule["experts"][c] if c < len(rule["experts"]) else -1
                if w and 0 <= expert < block["num_experts"]:
                    found[-1][expert] = found[-1].get(expert, 0.0) + w
        return found

    def ragged(self, layer: str) -> list[dict[str, np.ndarray]]:
        """Per expert of a ragged block: projection → float32 [O, K], bias → [O]."""
        layout, prefix = self.quantization["blocks"][layer]["layout"], self.prefix(layer)
        ends = np.cumsum(layout["widths"])
        experts: list[dict[str, np.ndarray]] = [{} for _ in ends]
        for name in layout["projections"]:
            stored = self._take(f"{prefix}{name}_proj.rows")
            assert stored[0] == STORED[layout["dtype"]]
            assert stored[1] == [ends[-1], layout["hidden_size"]]
            for expert, own in enumerate(np.split(as_float(*stored), ends[:-1])):
                experts[expert][name] = own.T if name == "down" else own
        for name, dtype in layout["biases"].items():
            stored = self._take(prefix + name)
            assert stored[0] == STORED[dtype]
            values = as_float(*stored)
            for expert, own in enumerate(values if name == "down_bias" else np.split(values, ends[:-1])):
                experts[expert][name] = own
        return experts

    def matrix(self, path: str) -> np.ndarray:
        """A matrix beside the experts, float32 [O, K]."""
        encoding = {k: v for k, v in self.quantization["matrices"][path].items() if k != "head"}
        bits, size = encoding["bits"], encoding["group_size"]
        name = f"b{bits}{'row' if size == -1 else f'g{size}'}{'' if encoding['symmetric'] else 'z'}"
        rows = self.tensors[f"{path}.{name}.scale"][1][1]
        # The number of columns isn't in the file: it follows from config.json. Here, from the source's shape.
        columns = self.columns[path]
        stack = self._stack(f"{path}.{name}.", encoding, name, (1, rows, columns))
        assert stack.shape == (1, rows, columns)
        return stack[0]

    def _add(self, prefix: str, entry: dict, weight: np.ndarray) -> None:
        """Add low-rank factors to the weights of a projection."""

        def factors(name: str, rank: int, *count: int) -> tuple[np.ndarray, np.ndarray]:
            stored = [self._take(f"{prefix}{name}.{side}") for side in ("left", "right")]
            assert [s[0] for s in stored] == 2 * [STORED[entry["dtype"]]]
            assert [s[1] for s in stored] == [[*count, weight.shape[1], rank], [*count, rank, weight.shape[2]]]
            return as_float(*stored[0]), as_float(*stored[1])

        assert len(entry["ranks"]) == len(weight)
        if entry["shared_rank"]:
            left, right = factors("shared", entry["shared_rank"])
            weight += left @ right
        for rank in set(entry["ranks"]) - {0}:
            members = [e for e, own in enumerate(entry["ranks"]) if own == rank]
            left, right = factors(f"r{rank}", rank, len(members))
            for slot, expert in enumerate(members):
                weight[expert] += left[slot] @ right[slot]

    def _stack(self, prefix: str, encoding: dict, name: str, shape: tuple[int, int, int]) -> np.ndarray:
        bits, columns = encoding["bits"], shape[2]
        if bits == 0:
            assert name == "dense"
            stored = self._take(prefix + "weight")
            assert stored[0] == STORED[encoding["dtype"]]
            return as_float(*stored)
        size = encoding["group_size"]
        zeros = "" if encoding["symmetric"] else "z"
        width = "t158" if bits == 1.58 else f"b{bits}"
        assert name == (f"{width}row{zeros}" if size == -1 else f"{width}g{size}{zeros}")
        groups = 1 if size == -1 else columns // size
        scales = self._take(prefix + "scale")
        assert scales[0] == STORED[encoding["dtype"]]
        assert scales[1][1:] == [shape[1], groups]
        dtype, stored, raw = self._take(prefix + "codes")
        assert dtype == "I32"
        codes = codes_of(stored, raw, bits, columns).astype(np.float32)
        zero = np.float32({1: 0.5, 1.58: 1}.get(bits, 2 ** (bits - 1)))
        if not encoding["symmetric"]:
            dtype, stored, raw = self._take(prefix + "zero")
            assert dtype == "I32"
            zero = np.repeat(codes_of(stored, raw, bits, groups).astype(np.float32), columns // groups, -1)
        return np.repeat(as_float(*scales), columns // groups, -1) * (codes - zero)

    def _take(self, name: str) -> tuple[str, list[int], bytes]:
        self.used.add(name)
        return self.tensors[name]
