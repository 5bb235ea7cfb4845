"""Questions about xLLM and about serving language models."""

from __future__ import annotations

from random import Random

from tools.demo.corpus.grammar import Prompts, Split, Turn, casual, exact, words
from tools.demo.corpus.serving_concepts import CONCEPTS, Concept
from tools.demo.corpus.serving_howtos import HOW_TOS

CATEGORY = "serving"

WHAT = Prompts(
    "serving.what",
    "![What is|What's|What are] {x}?",
    "![Explain|Describe] {x}[ to me|].",
    "Define {x}.",
    "!What does {x} mean?",
    "What do [you|people] mean by {x}?",
    "!Tell me [about|something about] {x}.",
    "!Can you [explain|describe] {x}[ to me|]?",
    "I [want|would like] to [understand|know about|learn about] {x}.",
    "!{x}?",
    "How would you [define|explain|describe] {x}?",
    "What exactly is {x}?",
    "Help me understand {x}.",
    "Give me a [short |brief |]explanation of {x}.",
    "Give me a [short |]definition of {x}.",
    "In [a few words|one sentence|short], what is {x}?",
    "I keep hearing about {x}. What is it?",
    "Do you know what {x} is?",
    "What is meant by {x}?",
    "Could you tell me what {x} is?",
    "Teach me about {x}.",
    "What can you tell me about {x}?",
    "I do not understand {x}.",
    "What is the meaning of {x}?",
    "What is the idea [behind|of] {x}?",
    "{x}: what is that?",
    "Somebody [mentioned|talked about] {x}. [What is that|What did they mean]?",
    "What's {x} [about|all about]?",
    "Please explain {x}[ in simple words|].",
    "[I am new to this|I am a beginner]. What is {x}?",
    "![How|In what way] does {x} work?",
    "What do I need to know about {x}?",
    "Who or what is {x}?",
    "Have you heard of {x}?",
    "Explain {x} like I am five.",
    "[Remind me|Tell me]: what is {x}?",
    "Tell me more about {x}.",
    "I [want|would like] to hear about {x}.",
    "Say something about {x}.",
    "Talk about {x}.",
    "What do you know about {x}?",
    "Information about {x}, please.",
    "Do you know anything about {x}?",
    "Introduce me to {x}.",
    "I have a question about {x}.",
    "I heard of {x}. [Can you explain it|What does it do]?",
    "!What does {x} do?",
    "[About|On] {x}: what should I know?",
    "I never understood {x}.",
    "{x} means what?",
    "What on earth is {x}?",
    "Give me the basics of {x}.",
)

WHY = Prompts(
    "serving.why",
    "!Why is {x} useful?",
    "!Why [do|would] [I|we|people] [need|use|want] {x}?",
    "!What is {x} good for?",
    "!Why does {x} matter?",
    "What is the [benefit|advantage|point|purpose] of {x}?",
    "What are the [benefits|advantages] of {x}?",
    "Why [use|have] {x}?",
    "Why is {x} important?",
    "How does {x} help?",
    "What do I gain from {x}?",
    "What problem does {x} solve?",
    "Why should I care about {x}?",
    "Is {x} useful?",
    "!What is {x} used for?",
    "What makes {x} useful?",
    "When is {x} [useful|helpful]?",
    "Why did people invent {x}?",
    "Tell me why {x} is [useful|important].",
    "Why would [someone|anyone|a server] [need|use|want] {x}?",
    "What good does {x} do?",
    "Do I [really |]need {x}?",
    "What happens without {x}?",
    "Why is {x} a good idea?",
    "What do we win with {x}?",
    "Why is everyone talking about {x}?",
    "What does {x} bring?",
    "Is {x} worth it?",
    "What do people use {x} for?",
    "For what is {x} used?",
    "What can {x} be used for?",
    "What use is {x}?",
    "How is {x} used?",
)

BOTH = Prompts(
    "serving.both",
    "!What is {x} and why is it useful?",
    "What is {x} and what is it good for?",
    "Explain {x} and why it matters.",
    "Tell me what {x} is and why I need it.",
    "What is {x}, and why should I use it?",
    "Define {x} and say why it is important.",
    "What's {x} and why do people want it?",
    "Describe {x} and its benefit.",
    "Explain what {x} is and how it helps.",
)

COMPARE = Prompts(
    "serving.compare",
    "!What is the difference between {x} and {y}?",
    "How do {x} and {y} differ?",
    "!Compare {x} and {y}.",
    "{x} versus {y}?",
    "{x} vs {y}?",
    "Explain {x} and {y}.",
    "What are {x} and {y}?",
    "What is {x} and what is {y}?",
    "How is {x} different from {y}?",
    "Tell me about {x} and {y}.",
    "Describe {x} and {y}.",
    "{x} or {y}: what is what?",
    "{x} and {y}: what is what?",
    "{x} or {y}: which is which?",
    "{x} and {y}?",
    "{x} or {y}?",
    "What do {x} and {y} mean?",
    "Explain {x} vs {y}.",
    "Explain {x} versus {y}.",
    "Help me tell {x} from {y}.",
    "What distinguishes {x} from {y}?",
)

HOW_TO = {how.key: Prompts("serving.how." + how.key, *how.questions) for how in HOW_TOS}

MORE = Prompts(
    "serving.more",
    "!Why is that useful?",
    "!Why[ is that|]?",
    "!Tell me more.",
    "[Can you|Could you] tell me more?",
    "Why does [it|that] matter?",
    "!What is it good for?",
    "How does that help?",
    "And why [do I need it|would I want that|is it useful]?",
    "More, please.",
    "Go on.",
    "What is the [point|benefit]?",
    "Interesting. Why is that?",
    "What good is that?",
    "And what is it good for?",
    "What is that used for?",
    "Why is it good?",
    "Ok, and why?",
    "Why do people use it?",
)

AND = Prompts(
    "serving.and", "!And {x}?", "!What about {x}?", "And what is {x}?", "How about {x}?", "Then what is {x}?"
)


def what(rng: Random, split: Split, concept: Concept) -> Turn:
    """Ask what a concept is."""
    user = WHAT.render(rng, split, x=casual(rng, rng.choice(concept.names), split))
    return Turn(user, concept.what, words(*concept.keys.split()), CATEGORY)


def _two_parts(rng: Random, split: Split, concept: Concept) -> Turn:
    """Ask for two things at once: what and why, or two concepts."""
    name = casual(rng, rng.choice(concept.names), split)
    if rng.random() < 0.5:
        user, second = BOTH.render(rng, split, x=name), concept.why
    else:
        other = rng.choice([c for c in CONCEPTS if c is not concept])
        user, second = (
            COMPARE.render(rng, split, x=name, y=casual(rng, rng.choice(other.names), split)),
            other.what,
        )
    # The comparison of two concepts is the explanation of each of them.
    return Turn(user, f"{concept.what} {second}", exact(f"{concept.what} {second}"), CATEGORY)


def single(rng: Random, split: Split) -> list[Turn]:
    """One question: what, why, or how to."""
    kind = rng.random()
    if kind < 0.30:
        how = rng.choice(HOW_TOS)
        return [Turn(HOW_TO[how.key].render(rng, split), how.answer, words(*how.keys.split()), CATEGORY)]
    concept = rng.choice(CONCEPTS)
    if kind < 0.68:
        return [what(rng, split, concept)]
    if kind < 0.80:
        return [_two_parts(rng, split, concept)]
    user = WHY.render(rng, split, x=casual(rng, rng.choice(concept.names), split))
    return [Turn(user, concept.why, words(*concept.keys.split()), CATEGORY)]


def follow_up(rng: Random, split: Split) -> list[Turn]:
    """A question and one that only makes sense after it."""
    first, second = rng.sample(CONCEPTS, 2)
    turns = [what(rng, "train", first)]
    if rng.random() < 0.5:
        turns.append(Turn(MORE.render(rng, split), first.why, words(*first.keys.split()), "multi-turn"))
    else:
        user = AND.render(rng, split, x=rng.choice(second.names))
        turns.append(Turn(user, second.what, words(*second.keys.split()), "multi-turn"))
    return turns
