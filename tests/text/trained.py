"""Small tokenizers of the two families, trained on the spot: nothing is downloaded."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 42 degrees, isn't it?",
    "def main(argc: int) -> None:\n    return {'key': [1, 2, 3]}\n\n\n",
    "你好，世界。今天天气很好。日本語のテキストです。 한국어 문장입니다.",
    "Ünïcödé naïve café résumé Straße",
    "smile 😀 family 👨‍👩‍👧‍👦 flag 🇩🇪 thumbs 👍🏽",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_backend(vocab_size: int = 420) -> Tokenizer:
    """Qwen's kind: NFC, a regex, bytes; special tokens, and an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("two words", normalized=False)]
    )
    return backend


def metaspace_backend(vocab_size: int = 600, *, prefix: bool = True) -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, byte fallback, a leading space that decoding takes away again."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    small = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    small.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    small.train_from_iterator(TEXTS[:2] + TEXTS[3:4], trainer)  # no CJK, no emoji: those come out as bytes
    state = json.loads(small.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # byte tokens are ordinary ones
    state["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram_backend() -> Tokenizer:
    """T5's kind: Unigram with the Metaspace decoder, which drops the first token's leading space."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def wordpiece_backend() -> Tokenizer:
    """BERT's kind."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level_backend,
    "metaspace": metaspace_backend,
    "metaspace-no-prefix": functools.partial(metaspace_backend, prefix=False),
    "unigram": unigram_backend,
    "wordpiece": wordpiece_backend,
}


@functools.cache
def _serialized(kind: str) -> str:
    return BACKENDS[kind]().to_str()


def backend(kind: str) -> Tokenizer:
    """A fresh copy, to be changed at will."""
    return Tokenizer.from_str(_serialized(kind))


def id_of(backend: Tokenizer, token: str) -> int:
    token_id = backend.token_to_id(token)
    assert token_id is not None, token
    return token_id


def write_model_dir(directory: Path, kind: str, config: dict[str, object]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_serialized(kind), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
