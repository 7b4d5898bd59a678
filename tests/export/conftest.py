"""Native folders that several files read."""

import functools
import json
import shutil

import pytest
from families import tiny_model
from packs import Packed, mixture
from safetensors.torch import load_file, save_file

from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.probe import streamed
from moe_compress.progress import Progress


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """Family → (source folder in bfloat16, native folder with all encodings and unequal layers, packed values)."""

    @functools.cache
    def build(name):
        root = tmp_path_factory.mktemp(name)
        tiny_model(name).bfloat16().save_pretrained(root / "source")
        model = MoEModel.open(root / "source")
        model.overlay = Packed(model, mixture, fewer=model.moe_layers[1:2])
        manifest = {"probe": streamed(model, list(range(3, 19)))}
        assert write_folder(model, root / "native", manifest, Progress()) == "native"
        return root / "source", root / "native", model.overlay.values

    return build


@pytest.fixture
def damaged(native, tmp_path):
    """Copy of a native folder with its tensors and config changed by a function."""

    def make(change, name="qwen3_moe"):
        folder = tmp_path / "damaged"
        shutil.copytree(native(name)[1], folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
