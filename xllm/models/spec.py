"""What a dense decoder-only model is made of, as data: its shape, and its parameters with where they come from.

Torch-free, so that memory can be planned before anything heavy is imported.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from xllm.config.decided import ModelConfig
from xllm.core.errors import ConfigError
from xllm.models.rope import Rope, read_rope


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens; its length is the number of layers
    rope: Rope
    tied: bool  # the output projection is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint."""

    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model: the checkpoint tensors it is made of, one above the other."""

    name: str
    kind: str  # "weight": a matrix in the device's own layout | "vector": a norm or bias in the activations' dtype
    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def numel(self) -> int:
        return prod(self.shape)


def base_spec(config: ModelConfig, **different: Any) -> DecoderSpec:
    """What every Llama-like config spells alike; a family passes what is its own."""
    hf = config.hf
    if (act := hf.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {act!r} is not supported by {config.architecture}; supported: silu")
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=hf["intermediate_size"],
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=read_rope(hf, config.head_dim),
        tied=bool(hf.get("tie_word_embeddings", False)),
        **{"windows": (None,) * config.num_layers, **different},
    )


def list_parameters(spec: DecoderSpec, names: Mapping[str, tuple[str, ...]]) -> tuple[Parameter, ...]:
    """Every parameter of the model; `names` is the family's weight map (see `xllm.models.llama`)."""
    return tuple(_parameters(spec, names))


def _parameters(spec: DecoderSpec, names: Mapping[str, tuple[str, ...]]) -> Iterator[Parameter]:
    yield _parameter("embed", names, (spec.vocab_size, spec.hidden))
    for i in range(len(spec.windows)):
        for part, shapes in _layer_shapes(spec).items():
            yield _parameter(part, names, *shapes, layer=i)
    yield _parameter("norm", names, (spec.hidden,))
    if not spec.tied:
        yield _parameter("lm_head", names, (spec.vocab_size, spec.hidden))


def _layer_shapes(spec: DecoderSpec) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Part of a layer -> shapes of the checkpoint tensors stacked in it."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden, inner = spec.hidden, spec.intermediate
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "attn_norm": ((hidden,),),
        "qkv": ((q, hidden), (kv, hidden), (kv, hidden)),
        "o": ((hidden, q),),
        "mlp_norm": ((hidden,),),
        "gate_up": ((inner, hidden), (inner, hidden)),
        "down": ((hidden, inner),),
    }
    if spec.qk_norm:
        shapes |= {"q_norm": ((spec.head_dim,),), "k_norm": ((spec.head_dim,),)}
    if spec.qkv_bias:
        shapes["qkv_bias"] = ((q,), (kv,), (kv,))
    if spec.o_bias:
        shapes["o_bias"] = ((hidden,),)
    if spec.mlp_bias:
        shapes |= {"gate_up_bias": ((inner,), (inner,)), "down_bias": ((hidden,),)}
    return shapes


def _parameter(
    part: str, names: Mapping[str, tuple[str, ...]], *shapes: tuple[int, ...], layer: int | None = None
) -> Parameter:
    tensors = [name.format(i=layer) for name in names[part]]
    return Parameter(
        name=part if layer is None else f"layers.{layer}.{part}",
        kind="weight" if len(shapes[0]) == 2 else "vector",
        sources=tuple(Source(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)),
    )
