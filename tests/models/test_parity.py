"""The same weights give what `transformers` gives: logits, greedy tokens, whole or in chunks, sharded or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.harness import Sequence, load

VOCAB = 211
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    family: str  # Llama | Mistral | Qwen2 | Qwen3
    config: dict[str, Any]
    prompt: int = 70
    shard: str | None = None  # largest shard


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


CASES = {
    "llama": Case("Llama", {}),
    "llama-tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama-mha": Case("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": Case("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "llama-head-dim": Case("Llama", {"head_dim": 40}),
    "llama-biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": Case("Llama", {"rope_parameters": rope("default", rope_theta=500000.0)}),
    "llama-sharded": Case("Llama", {}, shard="60KB"),
    "llama3-rope": Case(
        "Llama",
        {"rope_parameters": rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )},
    ),
    "llama-linear-rope": Case("Llama", {"rope_parameters": rope("linear", factor=4.0), "max_position_embeddings": 48}),
    "llama-dynamic-rope": Case(
        "Llama", {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": 48}, prompt=40
    ),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral-window": Case("Mistral", {"sliding_window": 24}),
    "mistral-default-window": Case("Mistral", {}),
    "qwen2": Case("Qwen2", {}),
    "qwen2-tied": Case("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": Case(
        "Qwen2",
        {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=32), "max_position_embeddings": 32},
    ),
    "qwen2-yarn-mscale": Case(
        "Qwen2",
        {"rope_parameters": rope(
            "yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.3, beta_fast=16,
            truncate=False,
        )},
    ),
    "qwen2-windows": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen2-window-off": Case("Qwen2", {"use_sliding_window": False, "sliding_window": 20, "max_window_layers": 0}),
    "qwen3": Case("Qwen3", {"head_dim": 32}),
    "qwen3-tied-sharded": Case("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}, shard="80KB"),
    "qwen3-biases": Case("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-layer-types": Case(
        "Qwen3",
        {
            "head_dim": 16, "use_sliding_window": True, "sliding_window": 13,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3-yarn": Case(
        "Qwen3",
        {"head_dim": 32, "rope_parameters": rope("yarn", factor=2.0, original_max_position_embeddings=64)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path, Any]:
    """(case, directory, the transformers model that was saved there)"""
    case = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.family}Config")(**(SMALL | case.config))
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, **({"max_shard_size": case.shard} if case.shard else {}))
    assert (directory / "model.safetensors.index.json").exists() == (case.shard is not None)
    return case, directory, model


@torch.inference_mode()
def test_parity(checkpoint: tuple[Case, Path, Any]) -> None:
    case, directory, theirs = checkpoint
    prompt = torch.randint(VOCAB, (case.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = load(directory)
    whole = ours.step([(Sequence(prompt), len(prompt))], every_token=True)
    expected = theirs(torch.tensor([prompt])).logits[0]
    assert relative(whole, expected) < 1e-4

    chunked = Sequence(prompt)
    rows = [ours.step([(chunked, count)], every_token=True) for count in (1, 7, 30, len(prompt) - 38)]
    assert relative(torch.cat(rows), expected) < 1e-4

    reply = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, len(prompt) :]
    assert len(reply) == 64
    assert load(directory).greedy(prompt, 64) == reply.tolist()
    assert load(directory, block_size=8).greedy(prompt, 64, chunk=13) == reply.tolist()


@torch.inference_mode()
def test_parity_in_bfloat16(checkpoint: tuple[Case, Path, Any]) -> None:
    """Between matrix products our activations stay in float32, so we must be closer to the exact logits of the
    rounded weights than transformers, which rounds after every operator. Tokens are rounded too where the
    processor multiplies bfloat16 itself: then about as close."""
    case, directory, theirs = checkpoint
    prompt = torch.randint(VOCAB, (case.prompt,), generator=torch.Generator().manual_seed(2)).tolist()
    ours = load(directory, dtype=torch.bfloat16)
    logits = ours.step([(Sequence(prompt), len(prompt))], every_token=True)
    rounded = type(theirs).from_pretrained(directory, dtype=torch.bfloat16).eval()
    in_bfloat16 = rounded(torch.tensor([prompt])).logits[0].float()
    exact = rounded.float()(torch.tensor([prompt])).logits[0]
    assert relative(logits, exact) < 0.03
    assert (logits - exact).square().mean() < 1.5 * (in_bfloat16 - exact).square().mean()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
