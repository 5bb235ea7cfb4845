"""The ways to ask for JSON, lists and counting."""

from __future__ import annotations

from tools.demo.corpus.grammar import Prompts

JSON_FOR = Prompts(
    "json.for",
    "!Give me a JSON object with {k} for {n}.",
    "[Write|Make|Create|Return|Produce|Generate] a JSON object with {k} for {n}.",
    "!JSON with {k} for {n}.",
    "I need a JSON object for {n} with {k}.",
    "Can you [give me|make|write] JSON with {k} for {n}?",
    "Describe {n} as JSON with {k}.",
    "As JSON: {k} of {n}.",
    "Please return JSON for {n} with the [keys|fields] {k}.",
    "Output a JSON record of {n} with {k}.",
    "Make JSON for a person called {n} with {k}.",
    "Show me {n} as a JSON object with the [fields|keys] {k}.",
    "Show {n} as JSON with {k}.",
    "Give me {n} as a JSON object with {k}.",
    "Represent {n} as JSON with {k}.",
    "I want {n} as JSON. The [fields|keys] are {k}.",
    "{n} as JSON with the [fields|keys] {k}.",
    "Store {n} as a JSON object with {k}.",
    "Put {n} into JSON with {k}.",
    "A JSON record for {n}: {k}.",
    "A JSON object for {n}, please. The keys are {k}.",
    "Create a user {n} in JSON with {k}.",
    "Return only JSON: {k} for {n}.",
    "Write JSON about {n}. Use the keys {k}.",
)

JSON_KEYS = Prompts(
    "json.keys",
    "!Give me a JSON object with [the keys |]{k}.",
    "[Write|Make|Create|Return|Generate] a JSON object with [the keys |the fields |]{k}.",
    "JSON with [the keys |]{k}, please.",
    "I need [JSON|a JSON object] with {k}.",
    "Can you [make|write|give me] a JSON example with {k}?",
    "Output JSON with [the fields |]{k}.",
    "An example of JSON with {k}?",
    "Show me a JSON object that has {k}.",
    "Reply in JSON with {k}.",
    "Make up a JSON record with {k}.",
    "Return JSON having the keys {k}.",
)

JSON_GIVEN = Prompts(
    "json.given",
    "!Turn this into JSON: {g}.",
    "Convert to JSON: {g}.",
    "Write this as JSON: {g}.",
    "Make a JSON object where {g}.",
    "!Give me a JSON object with {g}.",
    "JSON with {g}, please.",
    "Create JSON: {g}.",
    "Put this into a JSON object: {g}.",
    "Return a JSON object in which {g}.",
    "As JSON: {g}.",
    "Format as JSON: {g}.",
    "Express {g} in JSON.",
)

JSON_ARRAY = Prompts(
    "json.array",
    "!Give me a JSON array [of|with] {c} {g}.",
    "[Write|Make|Create|Return] a JSON [array|list] [of|with] {c} {g}.",
    "JSON array with {c} {g}, please.",
    "List {c} {g} as [JSON|a JSON array].",
    "I need {c} {g} in a JSON array.",
    "Can you [give me|write] {c} {g} as JSON?",
    "Output {c} {g} in JSON.",
    "Name {c} {g} in JSON format.",
)

LIST = Prompts(
    "lists.list",
    "![List|Name] {c} {g}.",
    "!Give me {c} {g}.",
    "Tell me {c} {g}.",
    "Can you [list|name|give me] {c} {g}?",
    "I need {c} {g}.",
    "What are {c} {g}?",
    "{c} {g}, please.",
    "Write a list of {c} {g}.",
    "Give me a list of {c} {g}.",
    "Make a list of {c} {g}.",
    "Do you know {c} {g}?",
    "Which {c} {g} do you know?",
    "Say {c} {g}.",
    "Could you write down {c} {g}?",
    "Show me {c} examples of {g}.",
    "Enumerate {c} {g}.",
)

NUMBERED = Prompts(
    "lists.numbered",
    "[List|Name] {c} {g} in a numbered list.",
    "Give me a numbered list of {c} {g}.",
    "Write {c} {g}, one per line.",
    "Number {c} {g}.",
    "List {c} {g}, numbered.",
    "{c} {g} as a numbered list, please.",
    "Make a list with numbers of {c} {g}.",
)

ONE = Prompts(
    "lists.one",
    "!Name [a|one] {g}.",
    "Give me [an example of |]a {g}.",
    "Tell me a {g}.",
    "Can you name a {g}?",
    "What is an example of a {g}?",
    "Say any {g}.",
    "Pick a {g}.",
)

COUNT = Prompts(
    "lists.count",
    "!Count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Count up from {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "List the numbers from {a} to {b}.",
    "Numbers from {a} to {b}?",
    "Say all numbers from {a} to {b}.",
    "Please count {a} to {b}.",
    "Give me the numbers {a} to {b}.",
    "Show the numbers between {a} and {b}.",
)

COUNT_TO = Prompts(
    "lists.count_to",
    "!Count to {b}.",
    "Can you count to {b}?",
    "Please count up to {b}.",
    "Count until {b}.",
    "How do you count to {b}?",
    "Count for me up to {b}.",
)

COUNT_DOWN = Prompts(
    "lists.count_down",
    "Count down from {a}.",
    "Count [back|backwards] from {a}.",
    "Can you count down from {a}?",
    "Do a countdown from {a}.",
    "Count from {a} to 1.",
    "Start at {a} and count down.",
)

MORE = Prompts(
    "lists.more",
    "Another one[, please|]?",
    "One more[, please|].",
    "And another[ one|]?",
    "Name one more.",
    "Give me another[ one|].",
    "Can you name another one?",
    "What else?",
    "And one more?",
    "Another example?",
    "More?",
    "Next one?",
)
