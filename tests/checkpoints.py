"""Small random checkpoints in Hugging Face format, with a tokenizer of their own, and what `transformers` makes of them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB = 320
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(directory: Path) -> None:
    """Byte-level BPE: three special tokens, the 256 bytes and a few merges."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(
        ["the cat and the hat", "a model that reads the text", "one two three four"] * 20, trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def save_qwen3(
    directory: Path, *, dtype: torch.dtype = torch.float32, max_position: int = 256, **changes: int
) -> Path:
    """A random Qwen3 small enough that a step takes a millisecond. Its weights are wide, so that tokens vary."""
    torch.manual_seed(7)
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, **changes,
    }  # fmt: skip
    config = Qwen3Config(
        **shape, max_position_embeddings=max_position, tie_word_embeddings=False, eos_token_id=2, bos_token_id=None,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def greedy(directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens after each prompt by `transformers`, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
    return found
