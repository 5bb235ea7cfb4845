"""Qwen3 (dense): Llama with a norm on every query and key head, an explicit head size and sliding windows."""

from xllm.config.decided import ModelConfig
from xllm.models.family import DecoderFamily, sliding_layers
from xllm.models.llama import ATTENTION, WEIGHT_MAP
from xllm.models.spec import DecoderSpec, base_spec


class Qwen3(DecoderFamily):
    weight_map = WEIGHT_MAP | {
        "q_norm": (ATTENTION + "q_norm.weight",),
        "k_norm": (ATTENTION + "k_norm.weight",),
    }

    @staticmethod
    def spec(config: ModelConfig) -> DecoderSpec:
        bias = bool(config.hf.get("attention_bias", False))
        return base_spec(config, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=sliding_layers(config))
