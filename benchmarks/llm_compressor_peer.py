"""llm-compressor's side of benchmarks/llm_compressor.py: run by the Python of an environment where it is installed.

    python benchmarks/llm_compressor_peer.py MODEL IDS.safetensors OUT BITS

GPTQ on every expert's projections, symmetric, groups of 64, all its other settings as they come; calibration tokens as
given. Prints one line of JSON: seconds of calibration and solving, without loading and saving; the same in seconds of
the processor, and those of solving alone.
"""

# ruff: noqa: E402
import json
import sys
import time

import torch

# torchvision, which it imports on the way, is built against CUDA on PyPI; beside a CPU-only torch its operators are
# missing, and only their names are needed.
_VISION = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _VISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    model_path, ids_path, output, bits = sys.argv[1:]
    ids = load_file(ids_path)["ids"]
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    weights = QuantizationArgs(num_bits=int(bits), type="int", symmetric=True, strategy="group", group_size=64)
    experts = r"re:.*mlp\.experts\..*(gate_proj|up_proj|down_proj)$"
    scheme = QuantizationScheme(targets=[experts], weights=weights)
    solving, solve = [], GPTQModifier.compress_modules

    def timed(modifier: GPTQModifier) -> None:
        began = time.process_time()
        solve(modifier)
        solving.append(time.process_time() - began)

    GPTQModifier.compress_modules = timed
    start, cpu_start = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        batch_size=8,
        pipeline="sequential",
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    if output != "-":
        model.save_pretrained(output, save_compressed=True)
    told = {"seconds": seconds, "cpu": cpu, "cpu_solving": sum(solving), "peak_gb": peak_gigabytes()}
    print(json.dumps(told), flush=True)


def peak_gigabytes() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
