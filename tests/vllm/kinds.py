"""Tiny models of every kind of KV cache that vLLM 0.32 runs on a CPU, with weights whose tokens depend on the KV."""

import dataclasses
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

BASE = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
}  # fmt: skip
MAMBA2 = {"conv_kernel": 4, "expand": 2, "chunk_size": 64}
HYBRID = {"mamba_n_groups": 1, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 64}


@dataclass(frozen=True)
class Kind:
    """One model: its architecture, the type that Transformers knows, and what differs from `BASE`.

    `unit` is the length in tokens of which every hit is a multiple, as vLLM makes it of the config. `groups` are the
    kinds of vLLM's specs, one a KV cache group, so that a vLLM that groups otherwise is noticed.
    """

    architecture: str
    model_type: str
    config: dict
    groups: tuple
    unit: int = 32
    options: dict = field(default_factory=dict)  # for vLLM's LLM
    hits_on_device: bool = True  # vLLM's own prefix cache is on
    survives_full_pool: bool = True
    weights: tuple = ()  # more of (part of a name, deviation times sqrt(fan-in))


KINDS = {
    "llama": Kind("LlamaForCausalLM", "llama", {}, ("FullAttentionSpec",)),
    "gemma3": Kind(
        "Gemma3ForCausalLM", "gemma3_text",
        {"num_hidden_layers": 6, "sliding_window": 128, "query_pre_attn_scalar": 64, "rope_local_base_freq": 1e4,
         "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
         "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
        ("FullAttentionSpec", *["SlidingWindowSpec"] * 5),
    ),
    "mistral": Kind("MistralForCausalLM", "mistral", {"sliding_window": 128}, ("SlidingWindowSpec",)),
    "llama4": Kind(
        "Llama4ForCausalLM", "llama4_text",
        {"attention_chunk_size": 128, "no_rope_layers": [1, 1, 1, 0], "num_local_experts": 2, "num_experts_per_tok": 1,
         "interleave_moe_layer_step": 1, "intermediate_size_mlp": 256, "use_qk_norm": True,
         "attn_temperature_tuning": False, "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
         "moe_layers": [0, 1, 2, 3]},
        ("FullAttentionSpec", *["ChunkedLocalAttentionSpec"] * 3),
    ),
    "lfm2": Kind(
        "Lfm2ForCausalLM", "lfm2",
        {"layer_types": ["conv"] * 3 + ["full_attention"], "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
         "block_ff_dim": 256, "block_dim": 256, "conv_dim": 256, "conv_dim_out": 256, "block_multiple_of": 32,
         "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "num_heads": 4},
        ("FullAttentionSpec", *["MambaSpec"] * 3),
    ),
    "falcon_h1": Kind(
        "FalconH1ForCausalLM", "falcon_h1",
        {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, **HYBRID},
        ("FullAttentionSpec", "MambaSpec"), unit=64,
    ),
    "granite4": Kind(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid",
        {"layer_types": ["mamba"] * 3 + ["attention"], "mamba_n_heads": 16, "mamba_d_head": 32, **HYBRID,
         "mamba_conv_bias": True, "mamba_proj_bias": False, "num_local_experts": 0, "num_experts_per_tok": 0,
         "shared_intermediate_size": 256, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
         "residual_multiplier": 1.0, "attention_multiplier": 0.125, "position_embedding_type": "nope"},
        ("FullAttentionSpec", *["MambaSpec"] * 3), unit=96,
    ),
    "qwen3_next": Kind(
        "Qwen3NextForCausalLM", "qwen3_next",
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
         "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": True,
         "mlp_only_layers": [], "full_attention_interval": 4, "partial_rotary_factor": 0.25,
         "torch_dtype": "bfloat16"},
        ("FullAttentionSpec", *["MambaSpec"] * 3), unit=160, options={"dtype": "bfloat16"},
    ),
    "mamba2": Kind(
        "Mamba2ForCausalLM", "mamba2",
        {"num_heads": 16, "head_dim": 32, "n_groups": 1, "state_size": 32, **MAMBA2, "intermediate_size": 512,
         "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "residual_in_fp32": False,
         "rms_norm": True},
        ("MambaSpec",),
    ),
    "gpt_oss": Kind(
        "GptOssForCausalLM", "gpt_oss",
        {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True,
         "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048,
                          "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
        ("FullAttentionSpec", "SlidingWindowSpec"),
    ),
    "deepseek": Kind(
        "DeepseekV2ForCausalLM", "deepseek_v2",
        {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "n_routed_experts": 4, "first_k_dense_replace": 10, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
         "n_shared_experts": 1, "moe_layer_freq": 1, "num_key_value_heads": 4, "rope_scaling": None},
        ("MLAAttentionSpec",), unit=16, options={"block_size": 16}, hits_on_device=False,
    ),
    "fp8": Kind(
        "LlamaForCausalLM", "llama", {}, ("UniformTypeKVCacheSpecs",),
        options={"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]}, survives_full_pool=False,
    ),
}  # fmt: skip


def write_config(folder, kind):
    config = {**BASE, **kind.config, "architectures": [kind.architecture], "model_type": kind.model_type}
    if kind.model_type == "deepseek_v2":  # which derives it
        del config["head_dim"]
    Path(folder, "config.json").write_text(json.dumps(config))


# ---- weights ---------------------------------------------------------------------------------------------------------

SCALES = (  # of a weight whose name has the first, the second over sqrt(fan-in) is the deviation
    ("embed", 0.02),
    ("o_proj", 4.0), ("out_proj", 4.0), ("down_proj", 4.0), ("w2", 4.0),
    ("qkv", 2.0), ("q_proj", 2.0), ("k_proj", 2.0), ("kv_a_proj", 2.0),
)  # fmt: skip


def sharpen(model, kind):
    """Set every weight, by its name alone, such that what attention and states yield decides the next token."""
    import torch

    def fill(name, module, weight):
        part = name.rsplit(".", 1)[-1]
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return
        if part == "A":
            weight.fill_(-0.05)
        elif part == "A_log":
            weight.fill_(-3.0)
        elif part == "dt_bias":
            weight.fill_(-1.0)
        elif "norm" in name or "norm" in type(module).__name__.lower():
            weight.fill_(0.0 if "Gemma" in type(module).__name__ else 1.0)  # Gemma's counts from 1
        elif weight.dim() < 2:
            weight.fill_(1.0 if part == "D" else 0.0)
        else:
            scale = next((scale for key, scale in (*kind.weights, *SCALES) if key in name), 1.0)
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(weight.shape, generator=draw)
            weight.copy_(values * (scale * weight.shape[-1] ** -0.5))

    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                fill(f"{prefix}.{name}", module, weight.data)


def patch_vllm(kind):
    """What a run on the CPU needs of vLLM 0.32 beside its own code; every engine of the process has it."""
    from engine_run import flatten_rotary_queries
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    # Before the CPU backend packs them: linear layers do not see what is written into their weights later.
    load_weights = DummyModelLoader.load_weights

    def load_sharp_weights(self, model, model_config):
        load_weights(self, model, model_config)  # buffers, and what is no float
        sharpen(model, kind)

    DummyModelLoader.load_weights = load_sharp_weights

    # The CPU kernel ignores that it shall return states from inside a chunk, and dies in any prompt of three blocks.
    get_spec = MambaMixer2.get_kv_cache_spec
    MambaMixer2.get_kv_cache_spec = lambda self, config: dataclasses.replace(
        get_spec(self, config), num_prefill_checkpoint_blocks=0
    )

    flatten_rotary_queries()  # or the KV of a token depends on the step it is computed in
