"""Llama 2, 3 and 3.x (with llama3 rope scaling), and the many checkpoints that share their architecture."""

from xllm.config.decided import ModelConfig
from xllm.models.family import DecoderFamily
from xllm.models.spec import DecoderSpec, base_spec

LAYER = "model.layers.{i}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."

WEIGHT_MAP = {
    "embed": ("model.embed_tokens.weight",),
    "attn_norm": (LAYER + "input_layernorm.weight",),
    "qkv": (ATTENTION + "q_proj.weight", ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"),
    "qkv_bias": (ATTENTION + "q_proj.bias", ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"),
    "o": (ATTENTION + "o_proj.weight",),
    "o_bias": (ATTENTION + "o_proj.bias",),
    "mlp_norm": (LAYER + "post_attention_layernorm.weight",),
    "gate_up": (MLP + "gate_proj.weight", MLP + "up_proj.weight"),
    "gate_up_bias": (MLP + "gate_proj.bias", MLP + "up_proj.bias"),
    "down": (MLP + "down_proj.weight",),
    "down_bias": (MLP + "down_proj.bias",),
    "norm": ("model.norm.weight",),
    "lm_head": ("lm_head.weight",),
}


class Llama(DecoderFamily):
    weight_map = WEIGHT_MAP

    @staticmethod
    def spec(config: ModelConfig) -> DecoderSpec:
        attention_bias = bool(config.hf.get("attention_bias", False))
        mlp_bias = bool(config.hf.get("mlp_bias", False))
        return base_spec(config, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)
