"""Mistral: Llama without biases, with one sliding window for all layers (4096 tokens unless the config says null)."""

from xllm.config.decided import ModelConfig
from xllm.core.errors import ConfigError
from xllm.models.family import DecoderFamily
from xllm.models.llama import WEIGHT_MAP
from xllm.models.spec import DecoderSpec, base_spec


class Mistral(DecoderFamily):
    weight_map = WEIGHT_MAP

    @staticmethod
    def spec(config: ModelConfig) -> DecoderSpec:
        window = config.hf.get("sliding_window", 4096)
        types = set(config.hf.get("layer_types") or ())
        if types - {"sliding_attention" if window else "full_attention"}:
            raise ConfigError(
                f"layer_types {sorted(types)} with sliding_window {window} is not supported by Mistral"
            )
        return base_spec(config, windows=(window,) * config.num_layers)
