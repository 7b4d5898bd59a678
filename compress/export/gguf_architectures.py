"""The architectures of llama.cpp that GGUF files are written for: their keys, their tensors' names and layouts.

Promise: `find_architecture` refuses by name what isn't known here, and every setting of a known family that llama.cpp's
loader has no key for (it would run, and compute something else). What is accepted is written as that loader reads it;
`Tensors` goes both ways, so that a written file can be read as the family's own checkpoint.

The rules are those of the model loaders in llama.cpp (src/models/{qwen3moe,qwen2moe,olmoe,llama,deepseek2}.cpp, of
2026): names by the `gguf` package, queries and keys of `llama` in interleaved order, `deepseek2`'s kv_b split into k_b
(transposed) and v_b.

Letters: A attention heads, N and V sizes of a key (without rope) and a value, C latent size, O, K rows and columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import RecipeError

Config = Mapping[str, Any]
PROJECTIONS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


def package() -> Any:
    """The `gguf` package. Raises RecipeError where it isn't installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise RecipeError("target 'llama.cpp' needs the package gguf: pip install 'moe-compress[gguf]'") from error


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp calls it.

    Attributes:
        name: in the file.
        refusals: what of a config can't be written, as reasons.
        metadata: writes the keys that only this architecture has.
        biases: tensors that may have one.
        interleaved: queries and keys are stored in the order in which rope pairs them.
        needs_output: a head that shares the embedding's weights is written all the same.
    """

    name: str
    refusals: Callable[[Config], list[str]]
    metadata: Callable[[Any, Config], None]
    biases: frozenset[str] = frozenset({"attn_q", "attn_k", "attn_v", "exp_probs_b"})
    interleaved: bool = False
    needs_output: bool = False


def find_architecture(config: Config) -> Architecture:
    """The architecture of a model. Raises RecipeError for one that isn't known, or a setting that can't be written.

    Args:
        config: as transformers has it (`to_dict`), defaults filled in.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise RecipeError(f"target 'llama.cpp': no GGUF is written for model type {model_type!r}, only for {known}")
    architecture = _ARCHITECTURES[model_type]
    reasons = [*_general_refusals(config), *architecture.refusals(config)]
    if reasons:
        raise RecipeError(f"target 'llama.cpp' can't express this {model_type}: {reasons[0]}")
    return architecture


def write_metadata(writer: Any, architecture: Architecture, config: Config, experts: int) -> None:
    """All keys about the model's shape. `experts`: in every layer, as they are now."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "default":
        writer.add_rope_scaling_type(package().RopeScalingType.NONE)
    else:
        types = package().RopeScalingType
        writer.add_rope_scaling_type(types.LINEAR if kind == "linear" else types.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(float(rope[key]))
    architecture.metadata(writer, config)


# --- what each architecture is ----------------------------------------------------------------------------------


def _general_refusals(c: Config) -> list[str]:
    rope = c.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    found = []
    if kind not in ("default", "linear", "yarn"):
        found.append(f"its rope_type is {kind!r}, and 'default', 'linear' and 'yarn' are written")
    if kind == "yarn" and rope.get("attention_factor") is not None:
        found.append("its rope has an attention_factor of its own")
    if float(rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("its rope turns a part of each head only")
    if c.get("hidden_act", "silu") != "silu":
        found.append(f"its activation is {c.get('hidden_act')!r}, llama.cpp computes silu")
    # A window that no text can exceed is none.
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window is not None and window < c["max_position_embeddings"]:
        found.append(f"it has a sliding window of {window}, which llama.cpp would ignore")
    return found


def _all_sparse(c: Config) -> list[str]:
    if c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) != 1:
        return ["some of its layers are dense, and this architecture has experts in all"]
    return []


def _normalises(c: Config, wanted: bool) -> list[str]:
    if bool(c.get("norm_topk_prob")) != wanted:
        return [f"norm_topk_prob is {bool(c.get('norm_topk_prob'))}, llama.cpp takes {wanted} for granted"]
    return []


def _head_dim(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def _square_heads(c: Config) -> list[str]:
    heads = c["num_attention_heads"] * _head_dim(c)
    return [] if heads == c["hidden_size"] else [f"its heads are {heads} wide together, not {c['hidden_size']}"]


def _grouped_queries(writer: Any, c: Config) -> None:
    writer.add_head_count_kv(c.get("num_key_value_heads") or c["num_attention_heads"])
    writer.add_key_length(_head_dim(c))
    writer.add_value_length(_head_dim(c))
    writer.add_rope_dimension_count(_head_dim(c))


def _qwen3(writer: Any, c: Config) -> None:
    _grouped_queries(writer, c)
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])


def _qwen2(writer: Any, c: Config) -> None:
    _qwen3(writer, c)
    writer.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])


def _olmoe_refusals(c: Config) -> list[str]:
    found = [*_normalises(c, False), *_square_heads(c)]
    if c.get("clip_qkv") is not None:
        found.append("it clips queries, keys and values")
    if c.get("num_key_value_heads") not in (None, c["num_attention_heads"]):
        found.append("it has fewer key heads than query heads")
    return found


def _deepseek_refusals(c: Config) -> list[str]:
    rope = c.get("rope_parameters") or {}
    found = []
    if c.get("rope_interleave", True) is False:
        found.append("its rope isn't interleaved")
    if rope.get("mscale", 1.0) != rope.get("mscale_all_dim", rope.get("mscale", 1.0)):
        found.append("its rope has two different mscales")
    if c.get("attention_bias"):
        found.append("its attention has biases")
    if c.get("moe_layer_freq", 1) != 1:
        found.append("not every layer after the dense ones has experts")
    # The loader knows by the number of layers alone whether queries are compressed.
    lite = c["num_hidden_layers"] in (26, 27) or (c["num_hidden_layers"] == 48 and c["vocab_size"] == 128256)
    if lite != (c.get("q_lora_rank") is None):
        what = "without" if c.get("q_lora_rank") is None else "with"
        found.append(f"llama.cpp doesn't expect {c['num_hidden_layers']} layers {what} q_lora_rank")
    if c["model_type"] == "deepseek_v2":
        if c.get("topk_method") == "group_limited_greedy" and (c.get("n_group") or 1) > 1:
            found.append("it ranks groups of experts by their best one, llama.cpp by their best two")
        if c.get("norm_topk_prob"):
            found.append("norm_topk_prob is set, which this family's code in transformers ignores")
    return found


def _deepseek(writer: Any, c: Config) -> None:
    latent, rope_size = c["kv_lora_rank"], c["qk_rope_head_dim"]
    writer.add_head_count_kv(1)  # latent attention is attention with one key head
    writer.add_leading_dense_block_count(c.get("first_k_dense_replace") or 0)
    if c.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope_size)
    writer.add_value_length(latent)
    writer.add_key_length_mla(c["qk_nope_head_dim"] + rope_size)
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_rope_dimension_count(rope_size)
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_shared_count(c.get("n_shared_experts") or 0)
    writer.add_expert_weights_scale(float(c.get("routed_scaling_factor") or 1.0))
    sigmoid = c["model_type"] == "deepseek_v3"
    gating = package().ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if sigmoid else gating.SOFTMAX)
    writer.add_expert_weights_norm(sigmoid and bool(c.get("norm_topk_prob")))
    if sigmoid:
        writer.add_expert_group_count(c.get("n_group") or 1)
        writer.add_expert_group_used_count(c.get("topk_group") or 1)
    mscale = (c.get("rope_parameters") or {}).get("mscale_all_dim")
    if mscale:
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(mscale))  # the loader divides by 0.1 again


_ARCHITECTURES: dict[str, Architecture] = {
    "qwen3_moe": Architecture("qwen3moe", lambda c: [*_all_sparse(c), *_normalises(c, True)], _qwen3),
    "qwen2_moe": Architecture(
        "qwen2moe",
        lambda c: [*_all_sparse(c), *_normalises(c, False), *_square_heads(c)],
        _qwen2,
        needs_output=True,
    ),
    "olmoe": Architecture("olmoe", _olmoe_refusals, _grouped_queries, needs_output=True),
    "mixtral": Architecture("llama", lambda c: [], _grouped_queries, interleaved=True),
    "deepseek_v2": Architecture("deepseek2", _deepseek_refusals, _deepseek),
    "deepseek_v3": Architecture("deepseek2", _deepseek_refusals, _deepseek),
}


# --- tensors ----------------------------------------------------------------------------------------------------


@dataclass
class Tensors:
    """Names and layouts of a model's tensors, experts excepted, in both directions.

    Args:
        architecture: of the model.
        config: of the model.
    """

    architecture: Architecture
    config: Config
    _names: Any = field(init=False)

    def __post_init__(self) -> None:
        gguf = package()
        number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture.name]
        self._names = gguf.get_tensor_name_map(number, self.config["num_hidden_layers"])

    def names(self, name: str) -> list[str]:
        """What a tensor is called in the file; several where it is split. Raises RecipeError where it has no place."""
        if name.endswith("kv_b_proj.weight") and self.architecture.name == "deepseek2":
            return [self._name(name.replace("kv_b_proj", part)) for part in ("k_b_proj", "v_b_proj")]
        return [self._name(name)]

    def shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names in the file → shapes there, of a tensor of that shape."""
        names = self.names(name)
        if len(names) > 1:
            heads, key, value = self._heads()
            return dict(zip(names, [(heads, shape[1], key), (heads, value, shape[1])], strict=True))
        return {names[0]: (shape[1],) if names[0].endswith("ffn_gate_inp_shexp.weight") else tuple(shape)}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor as the file has it: by name there."""
        names = self.names(name)
        if len(names) > 1:
            heads, key, value = self._heads()
            keys_ANC, values_AVC = tensor.view(heads, key + value, -1).split([key, value], dim=1)
            return {names[0]: keys_ANC.transpose(1, 2).contiguous(), names[1]: values_AVC.contiguous()}
        if self._turns(names[0]):
            tensor = _interleaved(tensor, self._head_count(names[0]))
        return {names[0]: tensor.reshape(self.shapes(name, tuple(tensor.shape))[names[0]])}

    def join(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The inverse of `split`: the tensor `name` of that shape."""
        names = self.names(name)
        if len(names) > 1:
            keys_ACN, values_AVC = parts[names[0]], parts[names[1]]
            return torch.cat([keys_ACN.transpose(1, 2), values_AVC], dim=1).reshape(shape)
        tensor = parts[names[0]]
        if self._turns(names[0]):
            tensor = _halves(tensor, self._head_count(names[0]))
        return tensor.reshape(shape)

    def _name(self, name: str) -> str:
        plain = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found = self._names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RecipeError(f"architecture {self.architecture.name!r} of llama.cpp has no place for {name!r}")
        if found.endswith(".bias") and found.split(".")[-2] not in self.architecture.biases:
            raise RecipeError(f"architecture {self.architecture.name!r} of llama.cpp has no bias {name!r}")
        return str(found)

    def _turns(self, name: str) -> bool:
        return self.architecture.interleaved and name.split(".")[-2] in ("attn_q", "attn_k")

    def _head_count(self, name: str) -> int:
        key = "num_key_value_heads" if name.split(".")[-2] == "attn_k" else "num_attention_heads"
        return int(self.config.get(key) or self.config["num_attention_heads"])

    def _heads(self) -> tuple[int, int, int]:
        return self.config["num_attention_heads"], self.config["qk_nope_head_dim"], self.config["v_head_dim"]


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head from (first halves, second halves) to pairs."""
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `_interleaved`."""
    return tensor.view(heads, tensor.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
