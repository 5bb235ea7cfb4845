"""Word lists that several categories share."""

from __future__ import annotations

NAMES = tuple(
    (
        "Alice Bob Carol David Emma Frank Grace Henry Ivy Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Sam Tina Uma "
        "Victor Wendy Xavier Yara Zoe Anna Ben Clara Daniel Elena Felix Gina Hugo Irene James Kate Liam Mia Noah Olivia "
        "Peter Ruth Simon Tom Lucy Max Laura Paul Sara Mark Julia Eric Lena Adam Sofia Ivan Nora Omar Amir Priya Ravi Mei "
        "Yuki Kenji Hana Chen Lin Wei Ling Diego Carlos Lucia Pablo Marta Jonas Ingrid Lars Astrid Fatima Ali Layla Hassan "
        "Aisha Kofi Ama Zuri Tariq Samir Leila Dmitri Olga Natasha Boris Pierre Claire Marie Luc Giulia Marco Paolo Chiara "
        "Anders Freya Erik Maja Tomas Petra Jana Viktor Agnes Theo Nadia Rafael Ines Bruno Alma Elias Ada Alan Dennis Ken "
        "Linus Margaret Edgar Donald John Mary Susan Robert Linda Michael Sarah Thomas Nancy Chris Jenny Kevin Amy Rachel "
        "George Helen Fiona Martin Judy Steve Diana Philip Monica Oliver Stella Arthur Violet"
    ).split()
)

ANIMALS = tuple(
    (
        "cat dog fox bear wolf rabbit horse cow pig sheep goat duck owl eagle mouse lion tiger elephant giraffe monkey "
        "penguin dolphin whale shark turtle frog snake bee butterfly spider hedgehog squirrel deer camel kangaroo panda "
        "koala parrot crow swan donkey otter badger beaver octopus crab snail ant hen rooster goose lizard crocodile"
    ).split()
)

FRUITS = "apple banana orange pear grape cherry lemon mango peach plum strawberry melon kiwi pineapple blueberry fig".split()
VEGETABLES = (
    "carrot potato tomato onion cabbage spinach pea bean cucumber pumpkin pepper broccoli leek radish".split()
)
COLOURS = "red blue green yellow orange purple pink brown black white grey".split()
TOOLS = "hammer saw screwdriver wrench drill pliers ladder shovel rake file".split()
INSTRUMENTS = "piano guitar violin flute drum trumpet harp cello clarinet".split()
SPORTS = "football tennis swimming running cycling basketball skiing rowing boxing volleyball".split()
VEHICLES = "car bus train bicycle boat plane truck ship tram scooter".split()
FURNITURE = "table chair bed sofa desk shelf cupboard lamp stool bench".split()
DRINKS = "water tea coffee milk juice lemonade cocoa".split()
JOBS = "teacher doctor nurse farmer baker pilot painter engineer gardener writer cook sailor".split()
FLOWERS = "rose tulip daisy lily sunflower violet orchid poppy".split()
SHAPES = "circle square triangle rectangle oval star".split()
LANGUAGES = "English French Spanish German Italian Portuguese Chinese Japanese Arabic Hindi".split()
PROGRAMMING = "Python C Rust Go Java Ruby Haskell Swift".split()

THINGS = tuple(
    (
        "clock lantern kite robot dragon castle boat teapot umbrella mirror violin key map book pencil balloon train star "
        "moon river mountain forest garden bridge lighthouse island cloud snowman wizard pirate princess knight giant king "
        "queen witch astronaut baker farmer painter sailor teacher inventor computer server rocket window door house tree "
        "flower mushroom stone shell puppet drum bell candle coin ring letter feather acorn pumpkin wheel hat scarf boot "
        "blanket pillow spoon tractor windmill well storm rainbow volcano desert ghost fairy mermaid unicorn toy dinosaur "
        "submarine telescope compass bicycle library school market bakery ship ladder"
    ).split()
)

ADJECTIVES = tuple(
    (
        "small big old young brave shy clever lazy happy sad hungry sleepy lonely curious tiny quiet noisy kind golden silver "
        "red blue green purple lost magic friendly grumpy careful fast slow wise funny wild gentle proud little"
    ).split()
)

CITIES = (
    "Paris London Berlin Madrid Rome Tokyo Oslo Vienna Lisbon Athens Cairo Delhi Lima Boston Dublin Prague Warsaw Beijing "
    "Seoul Toronto Chicago Sydney Geneva Milan Hamburg Lyon Porto Krakow Austin Denver"
).split()

FOODS = "pizza soup bread rice pasta cheese cake salad chocolate pancakes noodles sushi curry honey cookies".split()

HOBBIES = (
    "reading,painting,swimming,chess,gardening,cooking,dancing,hiking,cycling,fishing,singing,drawing,running,"
    "photography,knitting,programming,football,tennis,music,astronomy"
).split(",")

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()

PLAIN_WORDS = (
    "the a my your one green small quick light water paper morning window today tomorrow river bread music stone happy "
    "never always under over into cold warm blue seven open closed slow walk sing jump read write sun rain wind tree "
    "house road door glass apple table cloud bright early late home garden story hello world good night salt pepper"
).split()
