"""Qwen2 and Qwen2.5 (dense): Llama with biases on query, key and value, and sliding windows on some layers."""

from xllm.config.decided import ModelConfig
from xllm.models.family import DecoderFamily, sliding_layers
from xllm.models.llama import WEIGHT_MAP
from xllm.models.spec import DecoderSpec, base_spec


class Qwen2(DecoderFamily):
    weight_map = WEIGHT_MAP

    @staticmethod
    def spec(config: ModelConfig) -> DecoderSpec:
        return base_spec(config, qkv_bias=True, windows=sliding_layers(config))
