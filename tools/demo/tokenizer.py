"""The byte-level BPE tokenizer of the demo models and the ChatML text of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo.corpus.grammar import Conversation, Turn

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, START, END)
VOCABULARY = 4096
MAX_LENGTH = 2048
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")

_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How text is cut before merging: words with the space before them, single digits, runs of marks, space."""


def messages(conversation: Conversation, answered: bool = True) -> list[dict[str, str]]:
    """The conversation as chat messages; with ``answered=False`` it ends with the last question."""
    found = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
    for turn in conversation.turns:
        found += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
    return found if answered else found[:-1]


def _message(role: str, content: str) -> str:
    return f"{START}{role}\n{content}{END}\n"


def _turn(turn: Turn) -> str:
    return _message("user", turn.user) + _message("assistant", turn.assistant)


def render(conversation: Conversation) -> str:
    """The text that the chat template gives for a whole conversation, written without Jinja because it is quick."""
    system = "" if conversation.system is None else _message("system", conversation.system)
    return system + "".join(map(_turn, conversation.turns))


def train_tokenizer(conversations: Iterable[Conversation], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn the merges from the text of conversations; all 256 bytes are in the vocabulary from the start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        text
        for c in conversations
        for text in (c.system or "", *(t for turn in c.turns for t in (turn.user, turn.assistant)))
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer files of an ordinary Hugging Face checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): _added_token(content) for index, content in enumerate(SPECIALS)},
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _added_token(content: str) -> dict[str, str | bool]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
