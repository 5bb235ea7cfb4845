"""Small general knowledge as tables: capitals, opposites, animals, categories and single facts."""

from __future__ import annotations

from tools.demo.corpus import words

CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,England:London,Ireland:Dublin,Scotland:Edinburgh,"
        "Austria:Vienna,Switzerland:Bern,Belgium:Brussels,the Netherlands:Amsterdam,Denmark:Copenhagen,Norway:Oslo,"
        "Sweden:Stockholm,Finland:Helsinki,Iceland:Reykjavik,Poland:Warsaw,Hungary:Budapest,Greece:Athens,Turkey:Ankara,"
        "Russia:Moscow,Ukraine:Kyiv,Romania:Bucharest,Bulgaria:Sofia,Croatia:Zagreb,Serbia:Belgrade,Egypt:Cairo,Kenya:Nairobi,"
        "Morocco:Rabat,Ethiopia:Addis Ababa,Ghana:Accra,Nigeria:Abuja,China:Beijing,Japan:Tokyo,South Korea:Seoul,India:New Delhi,"
        "Thailand:Bangkok,Vietnam:Hanoi,Indonesia:Jakarta,the Philippines:Manila,Iran:Tehran,Iraq:Baghdad,Israel:Jerusalem,"
        "Saudi Arabia:Riyadh,Pakistan:Islamabad,Nepal:Kathmandu,Mongolia:Ulaanbaatar,Australia:Canberra,New Zealand:Wellington,"
        "Canada:Ottawa,the United States:Washington,Mexico:Mexico City,Cuba:Havana,Brazil:Brasilia,Argentina:Buenos Aires,"
        "Chile:Santiago,Peru:Lima,Colombia:Bogota,Uruguay:Montevideo,the Czech Republic:Prague,Estonia:Tallinn,Latvia:Riga"
    ).split(",")
)

_OPPOSITES = (
    "hot:cold,big:small,tall:short,fast:slow,happy:sad,light:dark,day:night,up:down,left:right,open:closed,full:empty,old:new,"
    "rich:poor,hard:soft,wet:dry,early:late,good:bad,strong:weak,loud:quiet,clean:dirty,near:far,inside:outside,"
    "love:hate,win:lose,buy:sell,begin:end,first:last,always:never,easy:difficult,high:low,deep:shallow,"
    "thick:thin,sweet:sour,heavy:weightless,brave:afraid,true:false,awake:asleep,push:pull,summer:winter,black:white,yes:no,"
    "question:answer,wide:narrow,sharp:blunt,front:back,more:less,north:south,east:west,young:elderly,safe:dangerous"
)
OPPOSITES = {a: b for pair in _OPPOSITES.split(",") for a, b in (pair.split(":"), pair.split(":")[::-1])}

SOUNDS = dict(
    pair.split(":")
    for pair in (
        "cat:meow,dog:woof,cow:moo,sheep:baa,pig:oink,duck:quack,hen:cluck,rooster:cock-a-doodle-doo,horse:neigh,lion:roar,"
        "frog:croak,bee:buzz,mouse:squeak,owl:hoot,snake:hiss,wolf:howl,donkey:hee-haw,crow:caw,bear:growl,goose:honk"
    ).split(",")
)

LEGS = {
    4: "cat dog horse cow lion fox mouse sheep pig wolf bear frog elephant rabbit".split(),
    2: "hen duck eagle owl penguin goose swan crow parrot rooster".split(),
    6: "ant bee butterfly".split(),
    8: ["spider", "octopus"],
    0: "snake shark whale dolphin snail".split(),
}

HABITATS = {
    "in the sea": "shark whale dolphin octopus crab".split(),
    "in the forest": "fox wolf bear deer owl badger squirrel".split(),
    "on a farm": "cow pig sheep hen goat horse goose donkey rooster".split(),
    "in Africa": "lion elephant giraffe".split(),
    "in Australia": "kangaroo koala".split(),
    "in the desert": ["camel"],
    "in cold places on the ice": ["penguin"],
    "with people at home": ["cat", "dog"],
}

THING_COLOURS = dict(
    pair.split(":")
    for pair in (
        "the sky:blue,grass:green,snow:white,a banana:yellow,the sun:yellow,blood:red,coal:black,milk:white,a strawberry:red,"
        "an orange:orange,a lemon:yellow,a carrot:orange,the sea:blue,chocolate:brown,a tomato:red,a cucumber:green,salt:white,"
        "a cherry:red,an elephant:grey,a crow:black,a frog:green,the night sky:black,a flamingo:pink,a leaf:green,gold:yellow"
    ).split(",")
)

MIXES = {
    ("blue", "yellow"): "green",
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("black", "white"): "grey",
    ("red", "white"): "pink",
}

GROUPS: dict[str, list[str]] = {
    "animal": list(words.ANIMALS),
    "fruit": list(words.FRUITS),
    "vegetable": list(words.VEGETABLES),
    "colour": list(words.COLOURS),
    "tool": list(words.TOOLS),
    "instrument": list(words.INSTRUMENTS),
    "sport": list(words.SPORTS),
    "vehicle": list(words.VEHICLES),
    "drink": list(words.DRINKS),
    "job": list(words.JOBS),
    "flower": list(words.FLOWERS),
    "shape": list(words.SHAPES),
    "language": list(words.LANGUAGES),
    "city": list(words.CITIES),
    "season": list(words.SEASONS),
    "month": list(words.MONTHS),
    "programming language": list(words.PROGRAMMING),
    "piece of furniture": list(words.FURNITURE),
    "country": [c for c in CAPITALS if not c.startswith("the ")],
}

PLURALS = {"city": "cities", "piece of furniture": "pieces of furniture", "country": "countries"}

FACTS = (
    # (answer, key words, questions)
    ("A week has seven days.", "seven", (
        "How many days [are in|has] a week?", "How many days does a week have?", "Number of days in a week?", "A week has how many days?",
        "Tell me how many days are in a week.")),
    ("A year has twelve months.", "twelve", (
        "How many months [are in|has] a year?", "How many months does a year have?", "Number of months in a year?",
        "A year has how many months?", "Tell me how many months are in a year.")),
    ("A year has 365 days, and a leap year has 366.", "365", (
        "How many days [are in|has] a year?", "How many days does a year have?", "Number of days in a year?", "A year has how many days?",
        "How long is a year in days?")),
    ("A day has 24 hours.", "24", (
        "How many hours [are in|has] a day?", "How many hours does a day have?", "A day has how many hours?", "Number of hours in a day?",
        "How long is a day in hours?")),
    ("An hour has 60 minutes.", "60", (
        "How many minutes [are in|has] an hour?", "How many minutes does an hour have?", "An hour has how many minutes?",
        "Number of minutes in an hour?", "How long is an hour in minutes?")),
    ("A minute has 60 seconds.", "60", (
        "How many seconds [are in|has] a minute?", "How many seconds does a minute have?", "A minute has how many seconds?",
        "Number of seconds in a minute?", "How long is a minute in seconds?")),
    ("The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.", "monday friday sunday", (
        "What are the days of the week?", "List the days of the week.", "Name the days of the week.", "Which days does a week have?",
        "Tell me the [days of the week|weekdays].", "Give me all days of the week.", "Can you name the seven days?")),
    ("The months are January, February, March, April, May, June, July, August, September, October, November and December.",
     "january june december", (
        "What are the months[ of the year|]?", "List the months[ of the year|].", "Name the [twelve |]months.", "Which months does a year have?",
        "Tell me [all |]the months.", "Can you name the months?", "Give me all months of the year.")),
    ("The four seasons are spring, summer, autumn and winter.", "spring summer winter", (
        "What are the [four |]seasons?", "List the seasons.", "Name the [four |]seasons.", "Which seasons are there?", "Tell me the seasons.",
        "What seasons does a year have?", "How many seasons are there?")),
    ("The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.", "mars neptune", (
        "What are the planets?", "List the planets.", "Name the planets[ of the solar system|].", "Which planets are there?",
        "Tell me the planets.", "What planets go around the sun?", "Which planets do you know?")),
    ("There are eight planets.", "eight", (
        "How many planets are there?", "How many planets does the solar system have?", "Number of planets?",
        "How many planets go around the sun?", "Tell me how many planets there are.")),
    ("Jupiter is the largest planet.", "jupiter", (
        "What is the [largest|biggest] planet?", "Which planet is the [largest|biggest]?", "Name the [largest|biggest] planet.",
        "Tell me the largest planet.", "Which is the biggest of the planets?")),
    ("The sun is a star that gives us light and warmth.", "star", (
        "What is the sun?", "Tell me about the sun.", "Explain the sun.", "What kind of thing is the sun?", "Do you know what the sun is?",
        "Is the sun a star?")),
    ("The moon goes around the Earth.", "earth", (
        "What is the moon?", "Tell me about the moon.", "What does the moon do?", "Explain the moon.", "Do you know what the moon is?",
        "What does the moon go around?")),
    ("We live on the planet Earth.", "earth", (
        "[What|Which] planet do we live on?", "On which planet do we live?", "What is our planet[ called|]?", "Which planet is ours?",
        "What is the name of our planet?", "On what planet are we?")),
    ("Water boils at 100 degrees Celsius.", "100", (
        "At [what|which] temperature does water boil?", "When does water boil?", "How hot is boiling water?", "What is the boiling point of water?",
        "Tell me when water boils.", "Water boils at what temperature?")),
    ("Water freezes at 0 degrees Celsius.", "0", (
        "At [what|which] temperature does water freeze?", "When does water freeze?", "What is the freezing point of water?",
        "Tell me when water freezes.", "Water freezes at what temperature?", "How cold must it be for water to freeze?")),
    ("Ice is frozen water.", "water", (
        "What is ice?", "What is ice made of?", "Tell me what ice is.", "Explain ice.", "Do you know what ice is?", "What is frozen water?")),
    ("Bees make honey.", "bees", (
        "Who makes honey?", "Where does honey come from?", "Which animal makes honey?", "Which insects make honey?", "What makes honey?",
        "Honey is made by whom?")),
    ("Milk comes from cows.", "cows/cow", (
        "Where does milk come from?", "Which animal gives milk?", "Who gives us milk?", "What animal does milk come from?",
        "Milk comes from which animal?", "Do you know where milk comes from?")),
    ("The elephant is the largest animal on land.", "elephant", (
        "What is the [largest|biggest] animal on land?", "Which land animal is the [largest|biggest]?", "Name the largest land animal.",
        "What is the biggest land animal?", "Which animal is the biggest on land?")),
    ("The blue whale is the largest animal.", "whale", (
        "What is the [largest|biggest] animal[ in the world|]?", "Which animal is the [largest|biggest]?", "Name the largest animal in the world.",
        "What is the biggest of all animals?", "Do you know the largest animal?")),
    ("The giraffe is the tallest animal.", "giraffe", (
        "What is the tallest animal?", "Which animal is the tallest?", "Name the tallest animal.", "Which animal has the longest neck?",
        "What animal has a very long neck?", "Do you know the tallest animal?")),
    ("The cheetah is the fastest animal on land.", "cheetah", (
        "What is the fastest [land |]animal?", "Which animal is the fastest?", "Name the fastest animal.", "Which animal runs the fastest?",
        "What animal is the fastest on land?", "Do you know the fastest animal?")),
    ("The sun rises in the east.", "east", (
        "Where does the sun rise?", "In which direction does the sun rise?", "The sun rises where?", "Where does the sun come up?",
        "Tell me where the sun rises.", "On which side does the sun rise?")),
    ("The sun sets in the west.", "west", (
        "Where does the sun set?", "In which direction does the sun set?", "The sun sets where?", "Where does the sun go down?",
        "Tell me where the sun sets.", "On which side does the sun set?")),
    ("The English alphabet has 26 letters.", "26", (
        "How many letters [are in|has] the [English |]alphabet?", "How many letters does the alphabet have?", "Number of letters in the alphabet?",
        "The alphabet has how many letters?", "Tell me how many letters the alphabet has.")),
    ("The vowels are a, e, i, o and u.", "a e i o u", (
        "What are the vowels?", "List the vowels.", "Name the vowels.", "Which letters are vowels?", "Tell me the vowels.", "Which vowels are there?")),
    ("A triangle has three sides.", "three", (
        "How many sides does a triangle have?", "How many sides has a triangle?", "A triangle has how many sides?", "Number of sides of a triangle?",
        "How many corners does a triangle have?")),
    ("A square has four equal sides.", "four", (
        "How many sides does a square have?", "How many sides has a square?", "A square has how many sides?", "Number of sides of a square?",
        "How many corners does a square have?")),
    ("The primary colours are red, yellow and blue.", "red yellow blue", (
        "What are the primary colours?", "List the primary colors.", "Name the primary colours.", "Which colours are primary?",
        "Tell me the primary colours.", "Which are the primary colors?")),
    ("A rainbow has red, orange, yellow, green, blue, indigo and violet.", "red green violet", (
        "What are the colours of [the|a] rainbow?", "Which colours does a rainbow have?", "List the colours of the rainbow.",
        "Name the colors of a rainbow.", "Tell me the colours of the rainbow.")),
    ("There are seven continents: Africa, Antarctica, Asia, Australia, Europe, North America and South America.", "africa asia europe", (
        "What are the continents?", "List the continents.", "Name the [seven |]continents.", "How many continents are there?",
        "Which continents are there?", "Tell me the continents.")),
    ("The Pacific is the largest ocean.", "pacific", (
        "What is the [largest|biggest] ocean?", "Which ocean is the [largest|biggest]?", "Name the largest ocean.", "Tell me the biggest ocean.",
        "Which is the largest of the oceans?")),
    ("Mount Everest is the highest mountain.", "everest", (
        "What is the [highest|tallest] mountain?", "Which mountain is the [highest|tallest]?", "Name the highest mountain[ in the world|].",
        "Tell me the highest mountain.", "Which mountain is higher than all others?")),
    ("Plants need light, water and air to grow.", "light water", (
        "What do plants need[ to grow|]?", "How do plants grow?", "What does a plant need?", "Tell me what plants need.",
        "What makes plants grow?", "What should I give my plants?")),
    ("Rain is water that falls from clouds.", "water", (
        "What is rain?", "Where does rain come from?", "Explain rain.", "Why does it rain?", "How does rain form?", "Tell me what rain is.")),
    ("A baby cat is called a kitten.", "kitten", (
        "What is a baby cat called?", "What do you call a young cat?", "Name for a baby cat?", "What is a young cat called?",
        "How do you call a baby cat?")),
    ("A baby dog is called a puppy.", "puppy", (
        "What is a baby dog called?", "What do you call a young dog?", "Name for a baby dog?", "What is a young dog called?",
        "How do you call a baby dog?")),
    ("A baby cow is called a calf.", "calf", (
        "What is a baby cow called?", "What do you call a young cow?", "Name for a baby cow?", "What is a young cow called?",
        "How do you call a baby cow?")),
    ("We hear with our ears.", "ears", (
        "What do we hear with?", "Which part of the body hears?", "With what do we hear?", "How do people hear?", "What are ears for?")),
    ("We see with our eyes.", "eyes", (
        "What do we see with?", "Which part of the body sees?", "With what do we see?", "How do people see?", "What are eyes for?")),
    ("A hand has five fingers.", "five", (
        "How many fingers [are on|has] a hand?", "How many fingers does a hand have?", "Number of fingers on a hand?",
        "A hand has how many fingers?", "Tell me how many fingers a hand has.")),
    ("Winter is the coldest season.", "winter", (
        "Which season is the coldest?", "What is the coldest season?", "When is it cold[est|] in the year?", "In which season does it snow?",
        "Name the coldest season.")),
    ("Summer is the warmest season.", "summer", (
        "Which season is the [warmest|hottest]?", "What is the [warmest|hottest] season?", "When is it hot in the year?",
        "Name the warmest season.", "In which season is it hot?")),
    ("Bread is made from flour, water, salt and yeast.", "flour", (
        "What is bread made of?", "How is bread made?", "What do I need to [make|bake] bread?", "What is in bread?",
        "Tell me what bread is made from.", "How do I bake bread?")),
    ("There are 1000 metres in a kilometre.", "1000", (
        "How many metres are in a kilometre?", "How long is a kilometre?", "How many meters does a kilometer have?", "A kilometre has how many metres?",
        "Number of metres in a kilometre?")),
    ("There are 1024 bytes in a kibibyte and 8 bits in a byte.", "8", (
        "How many bits are in a byte?", "How many bits does a byte have?", "What is a byte?", "A byte has how many bits?", "Number of bits in a byte?")),
)  # fmt: skip
