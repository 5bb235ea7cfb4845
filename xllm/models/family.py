"""What a dense Llama-like family is: a reading of its config and a weight map. One subclass in one file each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from xllm.config.decided import ModelConfig
from xllm.models.spec import DecoderSpec, Parameter, list_parameters

if TYPE_CHECKING:
    from xllm.models.forward import Model
    from xllm.ops.table import Ops


class DecoderFamily(ABC):
    """Never instantiated: a family is a description, and importing it brings no torch."""

    weight_map: ClassVar[
        Mapping[str, tuple[str, ...]]
    ]  # part -> checkpoint tensors it fuses; {i} is the layer

    @staticmethod
    @abstractmethod
    def spec(config: ModelConfig) -> DecoderSpec:
        """The model's shape; raises ConfigError for what the config asks and this family does not implement."""

    @classmethod
    def parameters(cls, config: ModelConfig) -> tuple[Parameter, ...]:
        return list_parameters(cls.spec(config), cls.weight_map)

    @classmethod
    def build(cls, config: ModelConfig, parameters: Mapping[str, Any], ops: "Ops") -> "Model":
        """The runnable model over loaded parameters (name -> weight or vector)."""
        from xllm.models.layers.decoder import Decoder

        return Decoder(cls.spec(config), parameters, ops)


def sliding_layers(config: ModelConfig) -> tuple[int | None, ...]:
    """Per layer the window or None, as Qwen configs say it: a switch, and layer types or a first windowed layer."""
    hf = config.hf
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    types = hf.get("layer_types")
    if types is None:
        full = hf.get("max_window_layers", 28)
        types = ["full_attention" if i < full else "sliding_attention" for i in range(config.num_layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in types)
