"""The model cards that stand beside the weights."""

from __future__ import annotations

import json
from typing import Any

_FRONT = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3
- xllm
- demo
---
"""

_LIMITS = """\
## Limits

- It knows what its grammars wrote and nothing else. Outside of that it should say so, and sometimes answers confidently
  and wrongly instead.
- It speaks English only. Any text goes through the tokenizer unharmed, but other languages are not understood.
- Sums reach three digits, products the times tables up to 12. Larger ones are refused or wrong.
- Stories follow a fixed plan. Values in JSON that the user did not give are made up.
- The scores come from held-out *wordings* (and operand pairs) of what was taught; they say nothing about other tasks.
- It is there to try a server, a client or a scheduler with replies that make sense. It is not fit for any real use.
"""

_MEASURES = {
    "smalltalk": "the reply holds the words that fit the intent",
    "serving": "the answer holds the required key words",
    "arithmetic": "the result is exact (operand pairs of + and - held out)",
    "knowledge": "the answer holds the fact",
    "story": "it names the topic, has 40 words or more and ends properly",
    "json": "it parses, with exactly the requested keys and the given values",
    "lists": "exact counting; a member of the group asked for",
    "echo": "exactly the text asked for",
    "unknown": "it says that it does not know",
    "multi-turn": "a follow-up is understood, or what was told earlier is remembered",
    "system": "the system prompt is followed and the answer is still right",
}


def _scores(scores: dict[str, Any]) -> str:
    lines = ["| category | questions | answered well | what counts |", "| --- | ---: | ---: | --- |"]
    for name, measure in _MEASURES.items():
        entry = scores[name]
        lines.append(f"| {name} | {entry['asked']} | {entry['passed'] / entry['asked']:.1%} | {measure} |")
    asked, passed = (sum(entry[key] for entry in scores.values()) for key in ("asked", "passed"))
    lines.append(f"| **all** | **{asked}** | **{passed / asked:.1%}** | |")
    return "\n".join(lines)


def _dialogues(samples: list[list[str]]) -> str:
    blocks = []
    for sample in samples:
        speakers = ("user", "assistant") * len(sample)
        blocks.append(
            "\n".join(f"{speaker}: {text}" for speaker, text in zip(speakers, sample, strict=False))
        )
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def _training(part: dict[str, Any], report: dict[str, Any]) -> str:
    data = report["data"]
    return f"""\
## How it was trained

Nothing was downloaded and no text was copied: the scripts in `tools/demo` hold grammars (greetings, questions about xLLM
and LLM serving, sums, small knowledge, stories, JSON, lists, repeating, memory over several turns, system prompts, and
questions to decline) and write the conversations from a seed.

- Data: {data["conversations"]:,} conversations, {data["tokens"]:,} tokens, in packed rows of {data["length"]} tokens with
  attention inside each conversation only.
- Training: {part["steps"]:,} steps, {part["tokens"]:,} tokens seen, AdamW, peak learning rate {report["recipe"]["learning_rate"]},
  cosine to zero, bfloat16 autocast; the loss counts the assistant's words fully and all others with weight
  {report["recipe"]["question_weight"]}.
- Machine: {part["device"]}, {part["seconds"]:.0f} seconds; last loss {part["loss"]:.3f}.
- Command: `{report["command"]}`
"""


def _file_table(part: dict[str, Any], shape: dict[str, Any]) -> str:
    return (
        f"{part['parameters']:,} parameters ({2 * part['parameters'] / 1e6:.1f} MB in bfloat16): vocabulary "
        f"{shape['vocabulary']}, hidden size {shape['hidden']}, {shape['layers']} layers, {shape['heads']} attention heads, "
        f"{shape['kv_heads']} key/value heads of {shape['head_dim']}, feed-forward {shape['intermediate']}, context "
        f"{shape['positions']}, embeddings tied."
    )


def demo_card(report: dict[str, Any]) -> str:
    """The card of the chat model."""
    part = report["demo"]
    return f"""\
{_FRONT}
# xLLM demo

A very small chat model (architecture Qwen3) that ships with xLLM, so that `xllm serve demo` and `xllm chat demo` run
offline and answer with words that make sense. {_file_table(part["outcome"], part["shape"])}

The tokenizer is a byte-level BPE of its own with the ChatML template; `<|im_end|>` ends a turn. System prompts are
supported.

{_training(part["outcome"], report)}
## Scores

Greedy decoding, on wordings that training never saw: whole paraphrase templates are held out, and any question that
training happened to ask in the same words is removed. The most ordinary wordings are always trained on, so they are not
among these questions.

{_scores(part["scores"])}

## Sample

All questions written by hand, outside of the templates, with the greedy replies as they came, good and bad. Nothing was
trained on these questions, but the replies of earlier models to them were read while the grammars grew.

{_dialogues(part["samples"])}

{_LIMITS}"""


def draft_card(report: dict[str, Any]) -> str:
    """The card of the draft model."""
    part, agreement = report["draft"], report["agreement"]
    return f"""\
{_FRONT}
# xLLM demo draft

A draft model for speculative decoding with the xLLM demo model: same tokenizer and vocabulary, a sixth of the size.
{_file_table(part["outcome"], part["shape"])}

It was trained on the same conversations; {report["recipe"]["distil"]:.0%} of its loss follows the distribution of the demo model.

## Agreement with the demo model

On {agreement["tokens"]:,} tokens of the demo model's greedy replies to the held-out questions, the draft's own choice is the
same token in {agreement["agreed"] / agreement["tokens"]:.1%} of the places. With {agreement["drafted"]} drafted tokens, one step of the
demo model yields {agreement["per_step"]:.2f} tokens on average.

{_training(part["outcome"], report)}
## Scores on its own

{_scores(part["scores"])}

{_LIMITS}"""


def dump(report: dict[str, Any]) -> str:
    """The report as JSON."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"
