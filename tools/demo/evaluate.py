"""Measure a finished checkpoint on held-out questions, the way users run it: Hugging Face files, greedy decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo.corpus.grammar import Conversation, Expect
from tools.demo.corpus.mixture import held_out_set
from tools.demo.corpus.stories import END as STORY_END
from tools.demo.data import question_hash
from tools.demo.tokenizer import messages

Message = dict[str, str]


class Chat:
    """A loaded checkpoint that answers many conversations at once."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()

    def answer(self, chats: Sequence[list[Message]], max_tokens: int = 192, batch: int = 1024) -> list[str]:
        """The greedy reply to each chat."""
        prompts = [self.prompt(chat) for chat in chats]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        replies = [""] * len(prompts)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            inputs = self.tokenizer(
                [prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
            )
            inputs = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                out = self.model.generate(
                    **inputs, max_new_tokens=max_tokens, do_sample=False, temperature=None, top_p=None
                )
            texts = self.tokenizer.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for index, text in zip(chosen, texts, strict=True):
                replies[index] = text
        return replies

    def prompt(self, chat: list[Message]) -> str:
        """The text of a chat up to where the assistant speaks."""
        text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text

    def predictions(self, prompt: str, reply: str) -> tuple[list[int], list[int]]:
        """The reply's tokens with the end mark, and this model's own choice at each of their places."""
        asked = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = [*self.tokenizer(reply, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = self.model(torch.tensor([asked + said], device=self.device)).logits[0]
        return said, logits[len(asked) - 1 : -1].argmax(-1).tolist()


def _occurs(word: str, text: str) -> bool:
    bounded = (
        (r"(?<!\w)" if word[:1].isalnum() else "")
        + re.escape(word)
        + (r"(?!\w)" if word[-1:].isalnum() else "")
    )
    return re.search(bounded, text, re.IGNORECASE) is not None


def _normal(text: str) -> str:
    return text.strip().strip(".!? ").casefold()


def _json_holds(expect: Expect, reply: str) -> bool:
    try:
        value = json.loads(reply)
    except json.JSONDecodeError:
        return False
    if expect.groups and expect.groups[0][0] == "#":
        _, count, *allowed = expect.groups[0]
        return (
            isinstance(value, list)
            and len(set(map(str, value))) == int(count)
            and set(map(str, value)) <= set(allowed)
        )
    wanted = {key: given for key, *given in expect.groups}
    if not isinstance(value, dict) or set(value) != set(wanted):
        return False
    return all(not given or json.dumps(value[key]) == given[0] for key, given in wanted.items())


def holds(expect: Expect, reply: str) -> bool:
    """Whether a reply meets an expectation."""
    if any(_occurs(word, reply) for word in expect.forbidden):
        return False
    if expect.kind == "json":
        return _json_holds(expect, reply)
    if expect.kind == "exact":
        return _normal(reply) in {_normal(accepted) for accepted in expect.groups[0]}
    if expect.kind == "number":
        found = re.findall(r"-?\d+", reply)
        return bool(found) and found[-1] == expect.groups[0][0]
    if expect.kind == "members":
        count, *allowed = expect.groups[0]
        return sum(_occurs(member, reply) for member in allowed) >= int(count)
    named = all(any(_occurs(word, reply) for word in group) for group in expect.groups)
    if expect.kind == "story":
        return named and reply.endswith(STORY_END) and len(reply.split()) >= 40
    return named and bool(reply.strip())


@dataclass
class Score:
    """How often a category was answered well, and some questions that were not."""

    asked: int = 0
    passed: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Passed over asked."""
        return self.passed / max(1, self.asked)


def unseen(conversations: Sequence[Conversation], asked_in_training: frozenset[int]) -> list[Conversation]:
    """Without the single questions that training happened to ask in the same words."""
    return [
        c
        for c in conversations
        if len(c.turns) > 1 or c.system is not None or question_hash(c.turns[0].user) not in asked_in_training
    ]


def held_out(seed: int, per_category: int, asked_in_training: frozenset[int]) -> list[Conversation]:
    """The evaluation set."""
    return unseen(held_out_set(seed, per_category), asked_in_training)


def score(conversations: Sequence[Conversation], replies: Sequence[str], keep: int = 8) -> dict[str, Score]:
    """Scores by category of the last turn's expectation."""
    scores: dict[str, Score] = {}
    for conversation, reply in zip(conversations, replies, strict=True):
        last = conversation.turns[-1]
        entry = scores.setdefault(last.category, Score())
        entry.asked += 1
        if holds(last.expect, reply):
            entry.passed += 1
        elif len(entry.failures) < keep:
            before = conversation.system or " / ".join(turn.user for turn in conversation.turns[:-1])
            entry.failures.append(
                {"before": before, "user": last.user, "reply": reply, "wanted": last.assistant}
            )
    return scores


def evaluate(chat: Chat, conversations: Sequence[Conversation]) -> tuple[dict[str, Score], list[str]]:
    """Answer and score the evaluation set."""
    replies = chat.answer([messages(c, answered=False) for c in conversations])
    return score(conversations, replies), replies


@dataclass(frozen=True)
class Agreement:
    """How well a draft model guesses the greedy tokens of the large one."""

    tokens: int
    agreed: int
    per_step: float
    """Tokens that one step of the large model yields when the draft proposes ``DRAFTED`` tokens."""

    @property
    def share(self) -> float:
        """The acceptance rate per token."""
        return self.agreed / max(1, self.tokens)


DRAFTED = 4


def steps_needed(matches: Sequence[bool]) -> int:
    """Verification steps for one reply when the draft proposes ``DRAFTED`` tokens at a time."""
    position = steps = 0
    while position < len(matches):
        accepted = 0
        while accepted < DRAFTED and position + accepted < len(matches) and matches[position + accepted]:
            accepted += 1
        position += accepted + 1
        steps += 1
    return steps


def agreement(draft: Chat, conversations: Sequence[Conversation], replies: Sequence[str]) -> Agreement:
    """Let the draft predict each token of the large model's replies from what stands before it."""
    tokens = agreed = steps = 0
    for conversation, reply in zip(conversations, replies, strict=True):
        said, guessed = draft.predictions(draft.prompt(messages(conversation, answered=False)), reply)
        matches = [a == b for a, b in zip(said, guessed, strict=True)]
        tokens, agreed, steps = tokens + len(said), agreed + sum(matches), steps + steps_needed(matches)
    return Agreement(tokens, agreed, tokens / max(1, steps))
