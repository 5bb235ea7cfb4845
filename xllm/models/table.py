"""Architecture name of a config.json -> who describes it. A new model is one file and one line here."""

import importlib

from xllm.core.errors import ConfigError
from xllm.models.family import DecoderFamily

ARCHITECTURES = {
    "LlamaForCausalLM": "xllm.models.llama:Llama",
    "MistralForCausalLM": "xllm.models.mistral:Mistral",
    "Qwen2ForCausalLM": "xllm.models.qwen2:Qwen2",
    "Qwen3ForCausalLM": "xllm.models.qwen3:Qwen3",
}


def find_family(architecture: str) -> type[DecoderFamily]:
    """Raises ConfigError, listing what is known, for an architecture that is not in the table."""
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"Architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    module, name = ARCHITECTURES[architecture].split(":")
    family: type[DecoderFamily] = getattr(importlib.import_module(module), name)
    return family
