"""Tiny random models of every MoE family that transformers implements with its experts interface.

Promise: for each folder name that `discover()` finds in the installed transformers (5.17 and 5.23 were tried),
`tiny_model(name)` builds a float32 model in a fraction of a second, of the class that a checkpoint of the family
names in its config.json wherever that class runs on text alone, and `model(**input_batch(model))` runs it on text.
Every model has hidden size 32 and 8 routed experts of width 16 (24 where the family calls it `intermediate_size`),
at least two MoE layers, a dense first layer where released checkpoints have one, two expert groups of which one
is kept where the family has groups, and random values in everything that routing reads, correction biases included.
Nothing is downloaded.
"""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
FIRST_PLACEHOLDER = 120  # ids from here on stand for images, sounds and the like: `input_batch` draws below


@dataclass(frozen=True)
class Family:
    """How to build one family."""

    name: str  # folder name under transformers/models
    architecture: str  # class to instantiate, as config.json's "architectures" would say
    config: str  # its config class
    settings: dict[str, Any]  # keyword arguments of that config
    note: str = ""  # what a reader must know


FAMILIES: dict[str, Family] = {}
NOTES = {
    "deepseek_v4": "layers 0 and 1 route by token id (buffer tid2eid); layers pass three residual streams",
    "diffusion_gemma": "an encoder reads input_ids, a non-causal decoder of the same weights refines decoder_input_ids",
    "dots3_note": "the vision tower has an MoE layer too (4 experts of width 12), which text does not reach",
    "ernie4_5_vl_moe": "each MoE layer has a second set of experts (width 12), which text does not reach",
    "gemma4": "router, experts and a dense MLP are children of the decoder layer itself; no audio tower",
    "glm5_next": "layers pass three residual streams",
    "hy_v4": "layers pass two residual streams",
    "inkling": "the router also scores the two shared experts",
    "inkling2": "layers also read the outputs of earlier blocks of layers",
    "jamba": "MoE in layers 1 and 3",
    "mistral4": "the text model alone: as released it may sit in Mistral3ForConditionalGeneration (text_config)",
    "mistral_large4": "layer 2 takes its keys and values from layer 1",
    "muse_spark": "experts work in a space of size 28, between two projections of the block, and end in a norm",
    "nemotron_h": "a layer is one block only (mamba, attention, MoE); experts have no gate and a space of size 28",
    "openai_privacy_filter": "a bidirectional token classifier, the only kind there is",
    "qwen3_omni_moe": "the text part: Qwen3OmniMoeForConditionalGeneration, which checkpoints name, has no forward",
    "qwen4_exp": "layers pass two residual streams side by side, 64 wide; layer 0 also reads the token ids",
    "zaya": "top-1; a ninth router class stands for no expert; routers read the previous layer's router state",
}


def _add(name: str, architecture: str, config: str, *parts: dict, **settings) -> None:
    """Register a family; of settings given twice, the later one counts."""
    merged = {key: value for part in (*parts, settings) for key, value in part.items()}
    FAMILIES[name] = Family(name, architecture, config, merged, NOTES.get(name, ""))


def _text(name: str, stem: str, *parts: dict, **settings) -> None:
    """A plain causal language model."""
    _add(name, f"{stem}ForCausalLM", f"{stem}Config", *parts, **settings)


def _seeing(name: str, stem: str, *parts: dict, ids: str, vision: dict, **more) -> None:
    """A model with other inputs than text too: `parts` are its text decoder's, `ids` its placeholder tokens."""
    text = {key: value for part in parts for key, value in part.items()}
    more |= {"text_config": text, "vision_config": vision, **_ids(ids)}
    _add(name, f"{stem}ForConditionalGeneration", f"{stem}Config", more)


def _ids(names: str) -> dict[str, int]:
    return {name: FIRST_PLACEHOLDER + i for i, name in enumerate(names.split())}


# ---- Parts of decoder settings ----

CORE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASE = {**CORE, "intermediate_size": 24}
TOP_2 = {"num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, **TOP_2}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 16, **TOP_2}
ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 16, **TOP_2}
GROUPS = {"n_group": 2, "topk_group": 1}
SHARED = {"n_shared_experts": 1}
SHARED_WIDTH = {"shared_expert_intermediate_size": 20}
DENSE_FIRST = {"first_k_dense_replace": 1}
SPARSE_FROM_1 = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

HEAD = {"head_dim": 16}
SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 6}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DELTA_HEADS = {f"linear_{what}": 2 for what in ("num_key_heads", "num_value_heads")}
DELTA = {**LINEAR, **DELTA_HEADS, "linear_key_head_dim": 12, "linear_value_head_dim": 12}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 12}
MLA = {"num_key_value_heads": 2, **LATENT}
MLA_Q = {**MLA, "q_lora_rank": 12}
INDEXER = {"index_topk": 6, "index_n_heads": 2, "index_head_dim": 12}
HYPER = {"hc_mult": 3, "hc_sinkhorn_iters": 3}

# ---- Text models ----

# Mixtral's layout: every layer sparse, no shared expert.
_text("mixtral", "Mixtral", BASE, LOCAL)
_text("phimoe", "Phimoe", BASE, LOCAL)
_text("minimax", "MiniMax", BASE, LOCAL, HEAD, LINEAR, block_size=5)
_text("minimax_m2", "MiniMaxM2", BASE, LOCAL, HEAD)
_text("olmoe", "Olmoe", BASE, TOP_2, num_experts=8)
_text("flex_olmo", "FlexOlmo", BASE, TOP_2, num_experts=8)
_text("gpt_oss", "GptOss", BASE, LOCAL, HEAD, SLIDING)

# Granite: as above, with or without shared experts next to the MoE block, and multipliers as those of its checkpoints
# (scores that attention doesn't scale, the config's default, make logits of float32 uncertain by 1e-4).
SCALED = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 1 / 16,
    "logits_scaling": 6.0,
}
_text("granitemoe", "GraniteMoe", BASE, LOCAL, SCALED)
_text("granitemoeshared", "GraniteMoeShared", BASE, LOCAL, SCALED, shared_intermediate_size=20)
_text("granitemoe_swa", "GraniteMoeSWA", BASE, LOCAL, SLIDING, SCALED, shared_intermediate_size=20)
GRANITE_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 6, "mamba_n_groups": 1}
GRANITE_HYBRID = {**GRANITE_MAMBA, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 20}
_text("granitemoehybrid", "GraniteMoeHybrid", BASE, LOCAL, SCALED, GRANITE_HYBRID)

# Qwen's layout: softmax routing, at most one shared expert.
_text("qwen2_moe", "Qwen2Moe", BASE, EXPERTS, SHARED_WIDTH)
_text("qwen3_moe", "Qwen3Moe", BASE, EXPERTS, HEAD, norm_topk_prob=True)
_text("qwen3_next", "Qwen3Next", BASE, EXPERTS, HEAD, SHARED_WIDTH, DELTA)
_text("flint", "Flint", BASE, EXPERTS, HEAD, SHARED_WIDTH, SLIDING, mlp_only_layers=[0])
_text("kolibri1", "Kolibri1", CORE, EXPERTS, HEAD, SHARED_WIDTH, SLIDING)
_text("laguna", "Laguna", BASE, EXPERTS, HEAD, SHARED_WIDTH, SLIDING, SPARSE_FROM_1)
_text("mellum", "Mellum", BASE, EXPERTS, HEAD, SLIDING)

# DeepSeek's layout: dense first layers, shared experts, groups, correction bias; first those with grouped queries.
V3 = {**BASE, **ROUTED, **GROUPS, **SHARED}
_text("glm4_moe", "Glm4Moe", V3, DENSE_FIRST, HEAD)
_text("dots1", "Dots1", V3, DENSE_FIRST)
_text("solar_open", "SolarOpen", CORE, ROUTED, GROUPS, SHARED, HEAD)
_text("mimo_v2_flash", "MiMoV2Flash", BASE, ROUTED, GROUPS, HEAD, SLIDING, SPARSE_FROM_1, v_head_dim=12)
_text("exaone_moe", "ExaoneMoe", BASE, EXPERTS, GROUPS, SLIDING, DENSE_FIRST, num_shared_experts=1)
_text("beam", "Beam", BASE, EXPERTS, GROUPS, HEAD, SLIDING, SPARSE_FROM_1)
# With latent attention.
_text("deepseek_v2", "DeepseekV2", V3, DENSE_FIRST, MLA_Q, topk_method="group_limited_greedy")
_text("deepseek_v3", "DeepseekV3", V3, DENSE_FIRST, MLA_Q)
_text("deepseek_v32", "DeepseekV32", V3, DENSE_FIRST, MLA_Q, INDEXER)
_text("glm4_moe_lite", "Glm4MoeLite", V3, SPARSE_FROM_1, MLA_Q)
_text("glm_moe_dsa", "GlmMoeDsa", V3, DENSE_FIRST, MLA_Q, INDEXER, indexer_types=["full", "shared", "full"])
_text("mistral4", "Mistral4", V3, MLA_Q)
_text("axk1", "AXK1", V3, DENSE_FIRST, MLA_Q)
_text("axk2", "AXK2", V3, DENSE_FIRST, MLA_Q, INDEXER)
HYV4 = {"indexer_types": ["full", "shared", "full"], "hc_mult": 2}
_text("hy_v4", "HYV4", V3, SPARSE_FROM_1, MLA_Q, INDEXER, HYV4)
# With linear attention in most layers.
HYBRID = {**BASE, **EXPERTS, **GROUPS, **SHARED, **DENSE_FIRST, **MLA}
_text("bailing_hybrid", "BailingHybrid", HYBRID, HEAD, LINEAR)
_text("kimi_linear", "KimiLinear", HYBRID, LINEAR, linear_head_dim=12, linear_num_heads=2)

# DeepSeek V4: no dense layer, but layers routed by token id.
V4 = {
    **HYPER,
    **INDEXER,
    "num_hidden_layers": 4,
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "sliding_window": 6,
    "q_lora_rank": 12,
    "o_groups": 2,
    "o_lora_rank": 12,
    "partial_rotary_factor": 0.5,
}
_text("deepseek_v4", "DeepseekV4", CORE, ROUTED, SHARED, HEAD, V4)

# Layouts of their own.
_text("hunyuan_v1_moe", "HunYuanMoEV1", BASE, HEAD, num_experts=8, moe_topk=2)
ERNIE = {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1}
_text("ernie4_5_moe", "Ernie4_5_Moe", BASE, ERNIE, moe_intermediate_size=16, moe_layer_start_index=1)
_text("afmoe", "Afmoe", BASE, EXPERTS, HEAD, SLIDING, num_dense_layers=1, num_shared_experts=1, route_scale=1.5)
_text("lfm2_moe", "Lfm2Moe", BASE, EXPERTS, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1)
_text("hy_v3", "HYV3", BASE, EXPERTS, HEAD, SPARSE_FROM_1, num_shared_experts=1)
COHERE = {"num_experts": 8, "num_shared_experts": 1, "prefix_dense_intermediate_size": 20, "logit_scale": 1.0}
_text("cohere2_moe", "Cohere2Moe", BASE, TOP_2, DENSE_FIRST, HEAD, SLIDING, COHERE)
JAMBA_MAMBA = {"use_mamba_kernels": False, "mamba_d_state": 6, "mamba_dt_rank": 4}
JAMBA_LAYERS = {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2}
_text("jamba", "Jamba", BASE, TOP_2, JAMBA_MAMBA, JAMBA_LAYERS, num_experts=8)
NEMOTRON = {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4, "use_mamba_kernels": False}
NEMOTRON |= {"moe_shared_expert_intermediate_size": 20, "moe_latent_size": 28}
NEMOTRON |= {"mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 6, "n_groups": 1}
_text("nemotron_h", "NemotronH", V3, HEAD, NEMOTRON)
_text("zaya", "Zaya", CORE, EXPERTS, head_dim=12, num_experts_per_tok=1, router_hidden_size=20)
_add(
    "openai_privacy_filter",
    "OpenAIPrivacyFilterForTokenClassification",
    "OpenAIPrivacyFilterConfig",
    {**BASE, **LOCAL, **HEAD, "sliding_window": 6},
)

# ---- Models that also see or hear: towers of one small layer, which text never reaches ----

TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE = {**TOWER, "intermediate_size": 20, "patch_size": 4}
SQUARE_EYE = {**EYE, "image_size": 16}
DEEP_EYE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "patch_size": 4}
GLM_EYE = {**DEEP_EYE, "out_hidden_size": 32, "image_size": 16}
QWEN_EYE = {**DEEP_EYE, "out_hidden_size": 32, "num_position_embeddings": 16}
STACK_EYE = {**QWEN_EYE, "deepstack_visual_indexes": [0]}
GEMMA_EYE = {**EYE, "model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8}
GEMMA_EYE |= {"position_embedding_size": 16, "pooling_kernel_size": 2}
SAM = {**TOWER, "mlp_dim": 20, "image_size": 16, "patch_size": 4, "window_size": 2, "global_attn_indexes": [0]}
SAM |= {"output_channels": 12, "downsample_channels": [12, 16]}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}
HALF_MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
QWEN_IDS = "image_token_id video_token_id vision_start_token_id vision_end_token_id"
IMAGE_VIDEO_IDS = "image_token_id video_token_id image_start_token_id image_end_token_id"
IMAGE_VIDEO_IDS += " video_start_token_id video_end_token_id"

# Qwen.
QWEN = {**BASE, **EXPERTS, **HEAD, **MROPE}
_seeing("qwen3_vl_moe", "Qwen3VLMoe", QWEN, ids=QWEN_IDS, vision=STACK_EYE)
QWEN_DELTA = {**CORE, **EXPERTS, **HEAD, **SHARED_WIDTH, **DELTA, **HALF_MROPE}
_seeing("qwen3_5_moe", "Qwen3_5Moe", QWEN_DELTA, ids=QWEN_IDS, vision=QWEN_EYE)
QWEN4 = {"hc_count": 2, "hc_lowrank": 12, "ple_layer_ids": [1], "ple_embed_dim": 20, "heads_per_ngram": 2}
QWEN4 |= {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2}
QWEN4 |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 12}
QWEN4 |= {"indexer_budget": 6, "indexer_compress_ratio": 2}
_seeing("qwen4_exp", "Qwen4Exp", QWEN_DELTA, QWEN4, ids=QWEN_IDS, vision=QWEN_EYE)
QWEN_EAR = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 20}
QWEN_EAR |= {"num_mel_bins": 8, "max_source_positions": 16, "output_dim": 32, "downsample_hidden_size": 12}
_add(
    "qwen3_omni_moe",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3OmniMoeThinkerConfig",
    {"text_config": QWEN, "vision_config": STACK_EYE, "audio_config": QWEN_EAR},
    _ids("audio_token_id image_token_id video_token_id audio_start_token_id"),
)

# GLM, ERNIE.
GLM_V = {**V3, **DENSE_FIRST, **HEAD, **HALF_MROPE}
_seeing("glm4v_moe", "Glm4vMoe", GLM_V, ids=IMAGE_VIDEO_IDS, vision=GLM_EYE)
GLM5 = {
    **HYPER,
    **INDEXER,
    "num_hidden_layers": 4,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
    "indexer_types": ["full", "full", "shared", "full"],
    "index_kpool": 2,
    "qk_rope_head_dim": 0,
    "linear_head_dim": 12,
    "linear_num_heads": 2,
}
GLM5_EYE = {**GLM_EYE, "projection_intermediate_size": 20}
_seeing("glm5_next", "Glm5Next", V3, MLA_Q, GLM5, ids=IMAGE_VIDEO_IDS, vision=GLM5_EYE)
ERNIE_ROPE = {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}
ERNIE_VL = {**BASE, **ERNIE, **ERNIE_ROPE, "moe_intermediate_size": [16, 12]}
_seeing("ernie4_5_vl_moe", "Ernie4_5_VLMoe", ERNIE_VL, ids=IMAGE_VIDEO_IDS, vision=DEEP_EYE)

# Gemma.
GEMMA = {**BASE, **HEAD, **SLIDING, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}
GEMMA |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
GEMMA_4 = {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY}
GEMMA_IDS = "image_token_id boi_token_id eoi_token_id"
GEMMA_4_IDS = f"{GEMMA_IDS} video_token_id audio_token_id boa_token_id eoa_token_index"
_seeing("gemma4", "Gemma4", GEMMA, GEMMA_4, ids=GEMMA_4_IDS, vision=GEMMA_EYE, audio_config=None)
_add(
    "diffusion_gemma",
    "DiffusionGemmaForBlockDiffusion",
    "DiffusionGemmaConfig",
    {"text_config": GEMMA, "vision_config": GEMMA_EYE, "canvas_length": 8},
    _ids(GEMMA_IDS),
)

# Inkling.
INKLING = {**CORE, **ROUTED, **HEAD, "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"]}
INKLING |= {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 16, "sliding_window_size": 6}
INKLING |= {"d_rel": 6, "rel_extent": 10}
INKLING_1 = {**SPARSE_FROM_1, "intermediate_size": 24, "n_shared_experts": 2, "logits_mup_width_multiplier": 2.0}
INKLING_1_IDS = "image_token_id audio_token_id image_bos_token_id audio_bos_token_id"
EAR = {"n_mel_bins": 4, "mel_vocab_size": 8}
INKLING_EYE = {**TOWER, "patch_size": 4}
_seeing("inkling", "Inkling", INKLING, INKLING_1, ids=INKLING_1_IDS, vision=INKLING_EYE, audio_config=EAR)
INKLING_2 = {"n_layers_per_attn_res_block": 2, "unpadded_vocab_size": VOCABULARY}
INKLING_2_EYE = {**EYE, "text_hidden_size": 32, "projection_hidden_dim": 20, "posemb_grid_size": 4}
_seeing("inkling2", "Inkling2", INKLING, INKLING_2, ids="image_token_id", vision=INKLING_2_EYE)

# Others.
_seeing(
    "aria",
    "Aria",
    {**BASE, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    ids="image_token_index",
    vision={**SQUARE_EYE, "model_type": "idefics3_vision"},
    projector_patch_to_query_dict={16: 4},
)
OCR = {**V3, **SPARSE_FROM_1, "topk_method": "group_limited_greedy"}
OCR_EYE = {"sam_config": SAM, "encoder_config": {**TOWER, "intermediate_size": 20, "num_key_value_heads": 2}}
_seeing("deepseek_ocr2", "DeepseekOcr2", OCR, ids="image_token_id", vision=OCR_EYE)
UNLIMITED_EYE = {"sam_config": SAM, "encoder_config": SQUARE_EYE}
_seeing("unlimited_ocr", "UnlimitedOcr", OCR, {"sliding_window": 6}, ids="image_token_id", vision=UNLIMITED_EYE)
MINIMAX_M3 = {**SPARSE_FROM_1, "dense_intermediate_size": 20, "shared_intermediate_size": 20, "rotary_dim": 8}
MINIMAX_M3 |= {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}
MINIMAX_M3 |= {"index_n_heads": 1, "index_head_dim": 12, "index_block_size": 2, "index_topk_blocks": 2}
_add(
    "minimax_m3_vl",
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3VLConfig",
    {"text_config": {**BASE, **LOCAL, **HEAD, **MINIMAX_M3}, "vision_config": SQUARE_EYE, "projector_hidden_size": 20},
    _ids("image_token_index video_token_index"),
)
LARGE_4 = {"num_hidden_layers": 4, "kv_source_layers": [0, 1, 1, 3]}
LARGE_4 |= {"indexer_types": ["full", "full", "shared", "full"]}
PIXTRAL = {**SQUARE_EYE, "model_type": "pixtral"}
_seeing("mistral_large4", "MistralLarge4", V3, MLA, INDEXER, LARGE_4, ids="image_token_index", vision=PIXTRAL)
MUSE_EAR = {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "out_hidden_size": 32}
_seeing(
    "muse_spark",
    "MuseSpark",
    {**BASE, **LOCAL, **HEAD, **SLIDING, "moe_intermediate_size": 16, "moe_hidden_size": 28, "output_multiplier": 1.0},
    ids="image_token_id video_token_id audio_token_id",
    vision={**EYE, "pos_emb_height": 4, "pos_emb_width": 4},
    audio_config=MUSE_EAR,
    out_hidden_size=16,
    projector_hidden_size=20,
)
DOTS = {**V3, **SPARSE_FROM_1, **MLA_Q, **INDEXER, **HEAD, "shared_experts_intermediate_size": 20}
DOTS |= {"layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "sliding_window": 6}
DOTS |= {f"swa_{key}": value for key, value in {**MLA_Q, **HEAD, "num_attention_heads": 2}.items()}
DOTS_EYE = {**EYE, "num_hidden_layers": 2, "pyramid_num_routed": [-1, 4], "moe_intermediate_size": 12}
DOTS_EYE |= {"adapter_in_dim": 16, "adapter_out_dim": 32}
DOTS_EAR = {**TOWER, "intermediate_size": 20, "feature_size": 8, "downsample_hidden_size": 12}
DOTS_EAR |= {"adapter_input_size": 16, "adapter_out_dim": 32}
DOTS_IDS = "image_token_id video_token_id audio_token_id"
_seeing("dots3_note", "Dots3Note", DOTS, ids=DOTS_IDS, vision=DOTS_EYE, audio_config=DOTS_EAR)


def discover() -> list[str]:
    """Folder names of the installed modelling files that use the experts interface."""
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return sorted({file.parent.name for file in files if "\n@use_experts_implementation" in file.read_text("utf-8")})


def tiny_model(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Random float32 model of one family, in eval mode; `overrides` go to the settings of its text decoder."""
    family = FAMILIES[name]
    settings = copy.deepcopy(family.settings)  # configs write into the dicts they are given
    settings.get("text_config", settings).update(overrides)
    config = getattr(transformers, family.config)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.architecture)._from_config(config, attn_implementation="eager")
        model = model.float().eval()
        _randomise(model)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw matrices and the routers' buffers afresh; vectors get noise added: norms to 1 or 0, biases to 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            parameter += 0.1 * torch.randn_like(parameter)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and name.endswith("tid2eid"):  # which experts a token id goes to
            tokens, top_k = buffer.shape
            experts = model.config.get_text_config().n_routed_experts
            buffer.copy_(torch.rand(tokens, experts).topk(top_k).indices)
        elif name in saved and name.endswith("balancing_biases"):  # zaya: loading resets the last one to -1
            torch.nn.init.normal_(buffer[:-1], mean=-1.0, std=0.1)
        elif name in saved and name.endswith("bias"):
            torch.nn.init.normal_(buffer, std=0.1)


def input_batch(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass over random text."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, FIRST_PLACEHOLDER, (batch, count), generator=generator)

    inputs: dict[str, Any] = {"input_ids": tokens(length)}
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:  # a decoder that reads its encoder's cache, so there must be one
        inputs["decoder_input_ids"] = tokens(model.config.canvas_length)
    elif "use_cache" in accepted or any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        inputs["use_cache"] = False
    return inputs
