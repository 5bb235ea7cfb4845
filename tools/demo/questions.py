"""Questions written by hand, outside of the templates: what a visitor might type. Nothing is trained on them.

Replies of earlier models to them were read while the grammars grew, so they steered them a little; those in ``LATER``
least, as they were written last.
"""

EARLIER = (
    "hi!",
    "what exactly can you do for me?",
    "I'm Robert, nice to meet you",
    "feeling a bit down today",
    "why would someone need a KV cache in an LLM server?",
    "what's continuous batching and why should I care",
    "explain ttft vs tpot",
    "how do i get the xllm server up and running?",
    "can I run this thing on a machine with no GPU?",
    "what's 17 + 25?",
    "compute 345 - 128 please",
    "If I have 12 apples and eat 5, how many remain?",
    "which is bigger, 304 or 340?",
    "give me a json object with name and age for Alice",
    "tell me a story about a brave little dragon",
    "who won the world cup in 1998?",
)

LATER = (
    "yo, who am I speaking with?",
    "got any good jokes for me?",
    "I'm starving, any ideas?",
    "could you briefly explain what paged attention does?",
    "my prompts all share the same long system prompt, does xLLM help with that?",
    "what flag do I need for speculative decoding?",
    "is quantization going to hurt my model?",
    "what is 250 plus 250",
    "Sam has 20 coins and finds 15 more, how many coins does Sam have now?",
    "9 x 6 = ?",
    "capital of norway pls",
    "how many legs does a spider have",
    "what's the opposite of loud?",
    "list four animals",
    "json with the keys title and price please",
    "write a bedtime story about a sleepy robot called Bolt",
    "please repeat: the quick brown fox",
    "count from 5 to 12",
    "what is the weather like in Berlin?",
    "can you write a python function for me?",
    "explain the French Revolution",
    "thanks, that was all!",
)

FREE_FORM = EARLIER + LATER

FOLLOWED = (
    ("My name is Olivia and I live in Rome.", "what's my name?"),
    ("What is the capital of Spain?", "and Portugal?"),
    ("I have a dog called Rex.", "what's the name of my dog?"),
    ("What is prefix caching?", "why is it useful?"),
    ("What is 20 + 22?", "now add 8"),
)
"""Two questions each: the second needs the first."""
