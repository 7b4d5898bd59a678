"""Compresses a small model on a device that isn't there, and on the CPU: `python on_device.py FOLDER CASE`.

A case is one of MEMORY or STREAMED, or the name of a family. Prints a line of JSON: how far the logits of both
are apart, relative to their size; devices of what the model holds; or the error.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

QUANTIZE = {"bits": 3.5, "group_size": 32, "widths": [2, 3, 4]}
PRUNE = {"prune.experts": {"experts": 6}}
# Passes on a model in memory.
MEMORY: dict[str, list[dict[str, Any]]] = {
    "rotated": [{"quantize.mixed": {**QUANTIZE, "rotate": "both"}}],
    "smoothed": [{"quantize.mixed": {**QUANTIZE, "smooth": "both"}}],
    "zero points": [{"quantize.mixed": {**QUANTIZE, "method": "hqq", "symmetric": False}}],
    "ternary, fisher": [{"quantize.mixed": {**QUANTIZE, "bits": 2.5, "widths": [1, 1.58, 3], "cost": "fisher"}}],
    "low rank": [{"quantize.mixed": {**QUANTIZE, "bits": 4.5, "low_rank": {"ranks": [0, 2], "shared": 1}}}],
    "everything": [{"quantize.mixed": {**QUANTIZE, "bits": 5, "include": ["experts", "attention", "embeddings"]}}],
    "solved gram": [{"quantize.mixed": {**QUANTIZE, "cost": "gram", "solver_gain": "solved"}}],
    "refitted": [PRUNE],
    "gram": [{"prune.experts": {"experts": 6, "criterion": "gram_greedy", "replace": "mean", "refit": False}}],
    "sensitivity": [{"prune.experts": {"experts": 6, "scope": "sensitivity", "criterion": "attribution"}}],
    "heapr": [{"prune.neurons": {"keep": 0.5, "criterion": "heapr"}}],
    "neurons in turn": [{"prune.neurons": {"keep": 0.5, "criterion": "refit_in_turn", "width": "free"}}],
    "recombined": [{"prune.dern": {"keep": 0.5}}],
    "zeros": [{"prune.weights": {"pattern": "2:4", "criterion": "sparsegpt"}}],
    "merged": [{"merge.average": {"experts": 6}}],
    "mergemoe": [{"merge.average": {"experts": 6, "preset": "mergemoe"}}],
    "subspace": [{"merge.subspace": {"experts": 6}}],
    "latent": [{"merge.factorise": {"keep": 0.6}}],
    "d2-moe": [{"merge.factorise": {"keep": 0.6, "method": "d2-moe"}}],
    "healed": [PRUNE, {"heal.router": {}}, {"heal.experts": {}}],
    "skipped": [{"skip.ratio": {"experts_per_token": 1.5}}],
}
# On a model of any family.
FAMILY: list[dict[str, Any]] = [
    {"prune.experts": {"experts": 6, "protect_super_experts": False}},
    {"quantize.mixed": {"bits": 9, "group_size": 4, "protect_super_experts": False}},
]
# From disk to disk, with the whole model in memory at the end or a layer at a time.
STREAMED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "streamed": ("0 GB", [PRUNE, {"heal.router": {}}, {"quantize.mixed": {**QUANTIZE, "cost": "gradient"}}]),
    "streamed, scored whole": ("4 GB", [{"merge.average": {"experts": 6}}, {"quantize.mixed": QUANTIZE}]),
    "streamed, packed embeddings": ("0 GB", MEMORY["everything"]),
}


def main(folder: Path, case: str) -> None:
    import torch
    from checkpoints import small_checkpoint, texts
    from families import FAMILIES, input_batch, tiny_model
    from pretended import DEVICE, pretended
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moe_compress
    from moe_compress.model.tensors import to_device

    torch.set_num_threads(1)
    source = small_checkpoint(folder / "model")
    text = texts(folder / "text")
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration = {"sources": [str(text / "calibration.jsonl")], "sequences": 8, "length": 64, "batch_size": 2}
    ids = torch.randint(3, 4000, (2, 20), generator=torch.Generator().manual_seed(0))

    def in_memory(passes: list[dict[str, Any]], device: torch.device) -> Any:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
        given = {"original": str(source)} if len(passes) > 1 else {}
        return moe_compress.compress(model, tokenizer=tokenizer, passes=passes, calibration=calibration, **given).model

    def of_family(name: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
        model = tiny_model(name).to(device)
        text = input_batch(model, batch=4, length=16)["input_ids"].cpu()
        return moe_compress.compress(model, passes=FAMILY, calibration=text).model, input_batch(model)

    def streamed(passes: list[dict[str, Any]], device: torch.device, memory: str) -> Any:
        output = Path(tempfile.mkdtemp(dir=folder)) / "out"
        moe_compress.run(
            {
                "model": str(source),
                "output": str(output),
                "passes": passes,
                "calibration": calibration,
                "evaluate": {"text": [str(text / "held-out.txt")], "length": 64},
                "compute": {"memory": memory, "dtype": "float32", "device": str(device)},
            }
        )
        return moe_compress.load(output, dtype=torch.float32).to(device)

    def compressed(device: torch.device) -> tuple[torch.Tensor, set[str]]:
        batch: dict[str, Any] = {"input_ids": ids}
        if case in FAMILIES:
            model, batch = of_family(case, device)
        elif case in MEMORY:
            model = in_memory(MEMORY[case], device)
        else:
            memory, passes = STREAMED[case]
            model = streamed(passes, device, memory)
        with torch.no_grad():
            logits = model(**to_device(batch, device)).logits.cpu()
        return logits, {value.device.type for value in [*model.parameters(), *model.buffers()]}

    found: dict[str, Any] = {}
    try:
        expected, _ = compressed(torch.device("cpu"))
        with pretended():
            logits, devices = compressed(DEVICE)
        found |= {"differs": float((logits - expected).norm() / expected.norm()), "devices": sorted(devices)}
    except Exception as error:
        found["error"] = "".join(traceback.format_exception(error)[-12:])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
