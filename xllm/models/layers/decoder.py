"""A dense decoder-only transformer over paged KV: what all Llama-like families run.

Legend: T tokens, R rows whose logits are wanted, K hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xllm.models.forward import Forward
from xllm.models.layers.attention import Attention
from xllm.models.layers.mlp import GatedMLP
from xllm.models.layers.rotary import RotaryTable
from xllm.models.spec import DecoderSpec
from xllm.ops.linear import tensors_of
from xllm.ops.table import FewOps, Ops


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: torch.Tensor
    attention: Attention
    mlp_norm: torch.Tensor
    mlp: GatedMLP


class Decoder:
    """Weights and the forward pass; keeps no state between calls but the rotary table."""

    on_layer: Callable[[], None] | None = None  # called after each layer: a sign of life within long steps

    def __init__(self, spec: DecoderSpec, parameters: Mapping[str, Any], ops: Ops):
        self.spec = spec
        self.ops = ops
        self.parameters = parameters
        self.embed = parameters["embed"]
        self.layers = [build_layer(i, spec, parameters, ops) for i in range(len(spec.windows))]
        self.norm = parameters["norm"]
        self.lm_head = parameters["embed" if spec.tied else "lm_head"]
        self.rotary = RotaryTable(spec.rope, device=self.norm.device)

    @torch.inference_mode()
    def forward(self, fwd: Forward) -> torch.Tensor:
        """Write KV of all T tokens; return the final-normed hidden states [R, K] of `logits_rows`."""
        few = self.ops.few
        if few is not None and fwd.attention.max_query_len == 1 and len(fwd.token_ids) <= few.max_tokens:
            return self._forward_few(fwd, few)
        ops, eps = self.ops, self.spec.norm_eps
        cos_sin_MR = self.rotary.upto(fwd.attention.max_context_len)
        residual_TK = ops.embedding(fwd.token_ids, self.embed, ops.activation_dtype)
        branch_TK = None  # what the last half-layer added, not yet in the residual
        for layer in self.layers:
            if branch_TK is None:
                x_TK = ops.rms_norm(residual_TK, layer.attn_norm, eps)
            else:
                x_TK = ops.add_rms_norm(branch_TK, residual_TK, layer.attn_norm, eps)
            branch_TK = layer.attention.forward(x_TK, fwd, cos_sin_MR)
            x_TK = ops.add_rms_norm(branch_TK, residual_TK, layer.mlp_norm, eps)
            branch_TK = layer.mlp.forward(x_TK)
            if self.on_layer is not None:
                self.on_layer()
        assert branch_TK is not None, "a decoder has at least one layer"
        if (rows := fwd.logits_rows) is not None:
            branch_TK, residual_TK = branch_TK[rows], residual_TK[rows]
        return ops.add_rms_norm(branch_TK, residual_TK, self.norm, eps)

    def _forward_few(self, fwd: Forward, few: FewOps) -> torch.Tensor:
        """The same for a decode step of few tokens, in fewer and larger operators."""
        ops, eps = self.ops, self.spec.norm_eps
        cos_sin_MR = self.rotary.upto(fwd.attention.max_context_len)
        residual_TK = ops.embedding(fwd.token_ids, self.embed, ops.activation_dtype)
        for layer in self.layers:
            a, mlp = layer.attention, layer.mlp
            qkv_TE = few.norm_linear(residual_TK, layer.attn_norm, eps, a.qkv, a.qkv_bias)
            out_TE = few.rope_cache_attention(
                qkv_TE, fwd.positions, cos_sin_MR, a.q_norm, a.k_norm, a.norm_eps,
                fwd.kv_cache, a.layer, fwd.attention, a.scale, a.window,
            )  # fmt: skip
            few.linear_add(out_TE, a.o, a.o_bias, residual_TK)
            inner_TI = few.norm_gate_up(residual_TK, layer.mlp_norm, eps, mlp.gate_up, mlp.gate_up_bias)
            few.linear_add(inner_TI, mlp.down, mlp.down_bias, residual_TK)
            if self.on_layer is not None:
                self.on_layer()
        wanted_TK = residual_TK if fwd.logits_rows is None else residual_TK[fwd.logits_rows]
        return ops.rms_norm(wanted_TK, self.norm, eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, K] -> [R, V] in the activations' dtype."""
        return self.ops.linear(hidden, self.lm_head, None)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All parameters, in whatever form the device keeps them."""
        for parameter in self.parameters.values():
            yield from tensors_of(parameter)


def build_layer(i: int, spec: DecoderSpec, parameters: Mapping[str, Any], ops: Ops) -> Layer:
    def part(name: str) -> Any:
        return parameters.get(f"layers.{i}.{name}")

    attention = Attention(
        layer=i,
        scale=spec.head_dim**-0.5,
        window=spec.windows[i],
        norm_eps=spec.norm_eps,
        qkv=part("qkv"),
        qkv_bias=part("qkv_bias"),
        q_norm=part("q_norm"),
        k_norm=part("k_norm"),
        o=part("o"),
        o_bias=part("o_bias"),
        ops=ops,
    )
    mlp = GatedMLP(
        gate_up=part("gate_up"),
        gate_up_bias=part("gate_up_bias"),
        down=part("down"),
        down_bias=part("down_bias"),
        ops=ops,
    )
    return Layer(part("attn_norm"), attention, part("mlp_norm"), mlp)
