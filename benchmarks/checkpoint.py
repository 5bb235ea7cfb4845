"""A checkpoint of Qwen3-0.6B's shape with random weights, made locally: speed does not depend on what weights say."""

import sys
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
LARGE: dict[str, Any] = SHAPE | {  # Qwen3-8B
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


def make(directory: Path) -> None:
    """Writes config, bf16 safetensors and a byte tokenizer; does nothing where they are complete already."""
    done = directory / "complete"
    if done.exists():
        return
    print(f"making a random checkpoint of Qwen3-0.6B's shape (1.2 GB) in {directory}", flush=True)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, eos_token_id=2, bos_token_id=None, pad_token_id=0, dtype=torch.bfloat16)
    model: Any = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16)
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    done.touch()


def save_byte_tokenizer(directory: Path) -> None:
    """One token per byte and two special ones: enough for an engine that wants a tokenizer beside the weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 3 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|pad|>", "<|start|>", "<|end|>")])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
