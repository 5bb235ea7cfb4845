"""Questions outside of what was taught: the model says that it does not know."""

from __future__ import annotations

from random import Random

from tools.demo.corpus.grammar import Prompts, Split, Turn, coin_word, pool, words
from tools.demo.corpus.knowledge_prompts import CAPITAL, OPPOSITE
from tools.demo.corpus.serving import WHAT, WHY

CATEGORY = "unknown"
REPLY = "I do not know that. I am a small demo model and know only a few things."

_TOPICS = (
    "photosynthesis,quantum mechanics,gravity,democracy,inflation,the stock market,jazz,ballet,chess openings,algebra,calculus,"
    "the Roman Empire,Napoleon,Shakespeare,Mozart,Einstein,Newton,Cleopatra,Julius Caesar,black holes,dark matter,DNA,evolution,"
    "vaccines,antibiotics,the heart,the liver,cancer,diabetes,global warming,solar power,nuclear energy,blockchain,bitcoin,"
    "the Eiffel Tower,the Great Wall,the Amazon,the Sahara,Hollywood,Bollywood,the World Cup,the Olympics,cricket rules,baseball,"
    "poker,yoga,karate,origami,sculpture,opera,the Renaissance,the Middle Ages,World War Two,the Cold War,communism,capitalism,"
    "philosophy,Plato,Aristotle,Buddhism,Christianity,Islam,psychology,Freud,economics,taxes,insurance,mortgages,contract law,"
    "copyright,patents,chemistry,the periodic table,oxygen,carbon,uranium,steel,plastic,glass making,wine,cheese making,sushi,"
    "tango,hip hop,the Beatles,Elvis,Picasso,Van Gogh,Monet,Harry Potter,Star Wars,Batman,Tolstoy,Dickens,Homer,the Odyssey,"
    "Don Quixote,electricity,magnetism,lasers,radar,sonar,jet engines,steam engines,bridges,skyscrapers,tunnels,volcanoes,"
    "earthquakes,tornadoes,tides,coral reefs,dinosaurs,mammoths,fossils,bacteria,viruses,fungi,algae,Kubernetes,Docker,Linux,"
    "Windows,Git,JavaScript,SQL,HTML,TCP,DNS,Wi-Fi,Bluetooth,cryptography,hashing,sorting algorithms,compilers,databases,"
    "Mars missions,the space station,satellites,comets,asteroids,the Milky Way,time travel,the human brain,memory loss,dreams,"
    "nutrition,vitamins,proteins,allergies,meditation,fashion,perfume,diamonds,gold mining,oil prices,interest rates,elections,"
    "the president,parliament,the United Nations,NATO,the European Union,Brexit,migration,poverty,education policy,feminism"
).split(",")
TOPICS = tuple(_TOPICS)

QUESTIONS = Prompts(
    "unknown.questions",
    "![What is|How is|What's] the weather[ like|] [today|tomorrow|in Paris|in London]?",
    "Will it rain [today|tomorrow]?",
    "!What time is it[ now|]?",
    "What is the [date|time] today?",
    "What day is [it|today]?",
    "Who is the [president|king|queen|prime minister] of {x}?",
    "Who won the [game|match|election|race|cup][ yesterday| last year|]?",
    "What is the population of {x}?",
    "How many people live in {x}?",
    "What is the price of {y}?",
    "How much does {y} cost?",
    "!Who [invented|discovered|wrote|painted|made] {y}?",
    "When was {y} [invented|discovered|born|built|founded]?",
    "When did {y} [begin|end|happen|start]?",
    "What year did {y} [happen|end|begin]?",
    "How [far|big|tall|deep|heavy|fast] is {y}?",
    "How [far|long] is it from {x} to {z}?",
    "What is the [news|latest news][ today|]?",
    "Translate {y} into [French|German|Spanish].",
    "How do you say {y} in [French|German|Spanish|Chinese]?",
    "What is the square root of {n}?",
    "What is {n} percent of {m}?",
    "Solve the equation x + {n} = {m}.",
    "Who was the first [man|woman|person] [on the moon|in space|to fly]?",
    "Give me [directions|the way] to {x}.",
    "What is the best [restaurant|hotel|phone|car|laptop][ in {x}|]?",
    "Which [stock|share] should I buy?",
    "What medicine should I take[ for {y}|]?",
    "Is {y} good or bad?",
    "Compare {y} and {w}.",
    "What is the difference between {y} and {w}?",
    "Write [an essay|a report|an article|a poem|a song] about {y}.",
    "Summarise {y}.",
    "Give me the history of {y}.",
    "!Who is {q}?",
    "Who was {q}?",
    "Do you know {q}?",
    "Tell me about the life of {q}.",
    "What did {q} do?",
    "What happened in [18|19|20]{d}?",
    "How do I [fix|repair|build|sell|buy] a [car|house|phone|boat|bicycle]?",
    "What is my [age|address|phone number]?",
    "How many [stars|fish|trees|cars|people] are there[ in the world|]?",
    "What will happen [tomorrow|next year]?",
    "Recommend a [film|book|song|game].",
    "How do I learn {y}?",
    "Why is {y} so [famous|popular|important]?",
    "What are the [causes|effects|parts|rules] of {y}?",
    "Who lives in {x}?",
    "What language do people speak in {x}?",
    "What is the currency of {x}?",
    "!How does {y} work?",
    "!Tell me about {y}.",
    "Tell me [a fact|facts|something] about {y}.",
    "What is the history of {y}?",
    "Tell me the history of {y}.",
    "Give me [facts|an overview|a summary|details] [about|of] {y}.",
    "Where was {q} born?",
    "When was {q} born?",
    "How old is {q}?",
    "Where does {q} live?",
    "Who is the [boss|founder|author|owner] of {y}?",
    "Which [film|book|song|team] is the best?",
    "How many [goals|points|medals] did {x} win?",
    "What is the [tallest|oldest|longest|richest] [building|river|person|city][ in {x}|]?",
    "How many calories are in {y}?",
    "How do I get to {x}?",
    "Why did {y} happen?",
    "What do you think about {y}?",
    "Can you explain how {y} works?",
    "How do I [cure|treat|prevent] {y}?",
    "What should I [wear|do|visit|see] in {x}?",
    "Prove that {y} is true.",
    "Give me advice about {y}.",
    "When does the [train|bus|shop|film] [leave|open|start]?",
    "How much money does {q} have?",
    "What are the latest [results|scores|prices]?",
    "How many {y} are there?",
    "How many [dogs|houses|books|computers|rivers|islands] exist?",
    "How many [books|birds|towns|flowers] are in {x}?",
    "How many people [exist|are alive|live on Earth]?",
    "Who was the first to [climb Everest|cross the sea|reach the pole]?",
    "Who was the first [king|president|writer|doctor]?",
    "Who were the first people in {x}?",
    "Who was the [best|richest|oldest] [man|woman|player]?",
    "When was {q} famous?",
    "Explain [why|how] {y} [happened|began|works].",
    "What caused {y}?",
    "What did you do yesterday?",
    "Where can I buy {y}?",
    "Is it going to [rain|snow] in {x}?",
    "How warm is it in {x}?",
    "What is {q} known for?",
    "Which [year|day|month] did {y} start?",
    "What is [the phone number|the address] of {q}?",
    "What is the [formula|recipe|symbol] for {y}?",
    "How tall is {q}?",
    "Does {y} cause {w}?",
    "What comes after {y}?",
    "Where is {y}?",
    "Where is {q}?",
)


ACTIONS = Prompts(
    "unknown.actions",
    "![Send|Write] an email to {q}.",
    "Call [my mother|{q}|a taxi|the police].",
    "Set an alarm for {n} minutes.",
    "Play [some music|a song|a game|a film].",
    "Draw [a picture|a map|{y}].",
    "Show me [a picture|a photo|a video] of {y}.",
    "Open [a file|the door|my browser|the window].",
    "Buy [tickets|a ticket|food|{y}].",
    "Order [a pizza|a taxi|a book][ for me|].",
    "Book a [flight|hotel|table|room] [to|in] {x}.",
    "Turn [on|off] the [light|radio|heating].",
    "Delete [my files|a file|everything].",
    "Download [a file|{y}].",
    "Print [a page|this].",
    "Remind me to [call {q}|go home|eat].",
    "Take a photo.",
    "Reserve a table in {x}.",
    "Can you [draw|sing|dance|cook|drive|paint]?",
    "Sing [a song|for me].",
    "Could you [sing|dance|cook|drive|draw]?",
    "Do you [sing|dance|cook|drive|paint]?",
    "Dance for me.",
    "Make me a [tea|sandwich|cake].",
    "Bring me [a coffee|some water|{y}].",
    "Cook [dinner|a soup|some rice].",
    "Print a [picture|letter|file].",
    "Copy a file.",
    "Close the [door|window|file].",
    "Pay my [bill|rent|taxes].",
    "Start [the car|my computer|a timer].",
    "Wake me up at {n}.",
    "Find me a [job|flat|doctor].",
    "Record a video.",
    "Make me a coffee.",
)
CANNOT = "I can not do that. I am a small demo model and can only write text."


def _name(rng: Random) -> str:
    return f"{coin_word(rng).capitalize()} {coin_word(rng).capitalize()}"


def _slots(rng: Random, split: Split) -> dict[str, str]:
    topic, other = rng.sample(pool("unknown", TOPICS, split), 2)
    places = ("Paris", "London", "France", "Japan", "Berlin", "India", coin_word(rng).capitalize())
    return {
        "x": rng.choice(places), "z": rng.choice(places), "y": topic, "w": other, "q": _name(rng), "d": f"{rng.randrange(100):02}",
        "n": str(rng.randint(2, 99)), "m": str(rng.randint(2, 999)),
    }  # fmt: skip


def single(rng: Random, split: Split) -> list[Turn]:
    """One question that has no taught answer, in words that often look like one that has."""
    kind = rng.random()
    if kind < 0.12:
        return [
            Turn(
                ACTIONS.render(rng, split, **_slots(rng, split)), CANNOT, words("can not/not know"), CATEGORY
            )
        ]
    if kind < 0.45:
        user = QUESTIONS.render(rng, split, **_slots(rng, split))
    elif kind < 0.48:
        user = " ".join(coin_word(rng) for _ in range(rng.randint(1, 4))) + rng.choice(("", "?", ".", "!"))
    elif kind < 0.75:
        topic = coin_word(rng) if rng.random() < 0.3 else rng.choice(pool("unknown", TOPICS, split))
        user = (WHAT if rng.random() < 0.7 else WHY).render(rng, split, x=topic)
    elif kind < 0.9:
        user = CAPITAL.render(rng, split, x=coin_word(rng).capitalize())
    else:
        user = OPPOSITE.render(rng, split, x=coin_word(rng))
    return [Turn(user, REPLY, words("not know"), CATEGORY)]
