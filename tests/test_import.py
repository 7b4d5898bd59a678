"""Importing the package: what it costs, what it offers, and in which order with transformers it works."""

import json

import pytest
from families import tiny_model
from packs import Packed, mixture
from running import python

import moe_compress
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.progress import Progress


def test_import_is_light():
    heavy = python(
        "-c",
        "import sys, moe_compress\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'pydantic') if m in sys.modules])",
    )
    assert heavy.strip() == "[]"


def test_public_names():
    """Every one resolves, is listed by `dir`, and says what it is; others are refused."""
    assert sorted(moe_compress.__all__) == moe_compress.__all__
    for name in moe_compress.__all__:
        value = getattr(moe_compress, name)
        assert value.__name__ == name
        assert value.__doc__
        assert name in dir(moe_compress)
    namespace = {}
    exec("from moe_compress import *", namespace)
    assert set(moe_compress.__all__) <= namespace.keys()
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = moe_compress.compres


# One child for each order of imports, forked after what transformers imports, which takes most of the time and is not
ORDERS = r"""
import json, os, sys, traceback
import accelerate, huggingface_hub, pydantic, scipy.optimize, tokenizers, torch
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.tensor
folder = sys.argv[1]
torch.set_num_threads(1)

def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [round(v, 5) for v in model(torch.arange(3, 9)[None]).logits[0, -1, :4].tolist()]

orders = {
    "before": "import moe_compress, transformers",
    "after the package": "import transformers, moe_compress",
    "after the classes": "from transformers import AutoModelForCausalLM\nimport moe_compress, transformers",
    "never": "import transformers",
}
for name, code in orders.items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder + "/../" + name.replace(" ", "_") + ".log", os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(code)
            answer = load()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        print(json.dumps([name, json.loads(pipe.read())]))
    os.waitpid(child, 0)
"""


def test_orders_of_imports(tmp_path):
    """from_pretrained knows the format whichever package came first; without this one it fails, and says at what."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    model = MoEModel.open(tmp_path / "source")
    model.overlay = Packed(model, mixture)  # all shapes outside the experts are what config.json says
    write_folder(model, tmp_path / "native", {}, Progress())
    answers = dict(json.loads(line) for line in python("-c", ORDERS, tmp_path / "native").splitlines())
    never = answers.pop("never")
    first = answers["before"]
    assert isinstance(first, list)
    assert len(answers) == 3
    assert all(answer == first for answer in answers.values()), answers
    assert isinstance(never, str), "a native checkpoint loaded without the package"
    assert 'experts_implementation="moe_compress"' in never
    assert "moe_compress" in (tmp_path / "never.log").read_text()
