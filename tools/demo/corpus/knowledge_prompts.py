"""The ways to ask for small general knowledge."""

from __future__ import annotations

from tools.demo.corpus.grammar import Prompts

CAPITAL = Prompts(
    "knowledge.capital",
    "!What is the capital of {x}?",
    "What's the capital of {x}?",
    "[Which|What] city is the capital of {x}?",
    "!Capital of {x}?",
    "Tell me the capital of {x}.",
    "Name the capital of {x}.",
    "Do you know the capital of {x}?",
    "What is the name of the capital of {x}?",
    "[Can|Could] you tell me the capital of {x}?",
    "What is {x}'s capital[ city|]?",
    "The capital of {x} is what?",
    "Which is the capital city of {x}?",
    "I want to know the capital of {x}.",
    "{x} has which capital?",
    "Where is the government of {x}? I mean the capital.",
    "I forgot the capital of {x}.",
    "Do you know {x}'s capital[ city|]?",
    "{x}'s capital?",
    "Tell me {x}'s capital[ city|].",
    "{x}: capital?",
    "What city is {x}'s capital?",
    "Is there a capital of {x}? Which one?",
    "And the capital of {x} is?",
    "What do they call the capital of {x}?",
)

COUNTRY = Prompts(
    "knowledge.country",
    "{x} is the capital of which country?",
    "Which country has the capital {x}?",
    "What country is {x} the capital of?",
    "Of which country is {x} the capital?",
    "In which country is {x}?",
    "!Where is {x}?",
    "Which country is {x} in?",
    "What country is {x} in?",
)

OPPOSITE = Prompts(
    "knowledge.opposite",
    "!What is the opposite of {x}?",
    "What's the opposite of {x}?",
    "Opposite of {x}?",
    "Tell me the opposite of {x}.",
    "Name the opposite of {x}.",
    "Which word is the opposite of {x}?",
    "Do you know the opposite of {x}?",
    "What is the contrary of {x}?",
    'What is the opposite of the word "{x}"?',
    "Give me the opposite of {x}.",
    "The opposite of {x} is what?",
    "What word means the opposite of {x}?",
    "{x} is the opposite of what?",
    "If something is not {x}, what is it? Give the opposite.",
    "Find the antonym of {x}.",
    "What is the antonym of {x}?",
    "Something is not {x}. What is it then?",
    "Not {x}, but the opposite. Which word?",
    "Say the opposite of {x}.",
    "{x}: what is the opposite?",
    "I look for the opposite of {x}.",
    "What would be the opposite of {x}?",
)

SOUND = Prompts(
    "knowledge.sound",
    "What sound does {x} make?",
    "!What does {x} say?",
    "How does {x} sound?",
    "Which sound does {x} make?",
    "Make the sound of {x}.",
    "What noise does {x} make?",
    "Tell me what {x} says.",
    "Do you know what sound {x} makes?",
)

LEG = Prompts(
    "knowledge.legs",
    "!How many legs does {x} have?",
    "How many legs has {x}?",
    "Number of legs of {x}?",
    "{x} has how many legs?",
    "Tell me how many legs {x} has.",
    "Do you know how many legs {x} has?",
    "On how many legs does {x} walk?",
)

HABITAT = Prompts(
    "knowledge.habitat",
    "!Where does {x} live?",
    "Where do you find {x}?",
    "Where can I see {x}?",
    "In what place does {x} live?",
    "Tell me where {x} lives.",
    "Do you know where {x} lives?",
    "What is the home of {x}?",
)

COLOUR = Prompts(
    "knowledge.colour",
    "!What [colour|color] is {x}?",
    "Which [colour|color] does {x} have?",
    "What is the [colour|color] of {x}?",
    "Tell me the [colour|color] of {x}.",
    "{x} has which [colour|color]?",
    "Do you know the [colour|color] of {x}?",
    "Color of {x}?",
)

MIX = Prompts(
    "knowledge.mix",
    "What [colour|color] do you get [if|when] you mix {a} and {b}?",
    "What do {a} and {b} make?",
    "Mix {a} and {b}: which [colour|color] is it?",
    "If I mix {a} with {b}, what colour do I get?",
    "{a} and {b} together make which color?",
    "Which colour comes from {a} and {b}?",
    "What happens when I mix {a} and {b} paint?",
)

KIND = Prompts(
    "knowledge.kind",
    "!What is {x}?",
    "What kind of thing is {x}?",
    "Tell me what {x} is.",
    "Do you know what {x} is?",
    "What sort of thing is {x}?",
    "Is {x} an animal, a fruit or something else?",
    "Which group does {x} belong to?",
)

IS_A = Prompts(
    "knowledge.is_a",
    "!Is {x} {y}?",
    "Would you say that {x} is {y}?",
    "Is it true that {x} is {y}?",
    "Tell me: is {x} {y}?",
    "{x} is {y}, right?",
    "Do you think {x} is {y}?",
)

AFTER = Prompts(
    "knowledge.after",
    "![What|Which] {k} comes after {x}?",
    "What is the {k} after {x}?",
    "Which {k} follows {x}?",
    "What {k} is after {x}?",
    "{x} is followed by which {k}?",
    "If it is {x}, what is the next {k}?",
    "If today is in {x}, what {k} comes next?",
    "It is {x}. What is the next {k}?",
    "When {x} is over, which {k} begins?",
    "{x} is over. Which {k} is next?",
    "What is the next {k} after {x}?",
    "What comes after {x}?",
)

BEFORE = Prompts(
    "knowledge.before",
    "[What|Which] {k} comes before {x}?",
    "What is the {k} before {x}?",
    "What {k} is before {x}?",
    "Which {k} is just before {x}?",
    "What comes before {x}?",
    "{x} comes after which {k}?",
)

AND = Prompts(
    "knowledge.and", "!And {x}?", "!What about {x}?", "And of {x}?", "How about {x}?", "And that of {x}?"
)
