"""Write the fixture corpus in `tests/data/corpus`: our own text, varied by a seeded generator.

Run `python tests/data/make_corpus.py` after a change here; goldens that depend on it change with it.
"""

import gzip
import json
import random
from pathlib import Path
from string import Template

FOLDER = Path(__file__).parent / "corpus"

PROSE = {
    "tides": [
        "The gauge at {place} recorded a high water of {a}.{b} metres on day {c} of the survey.",
        "Spring tides follow the full and the new moon by about {small} days, because the sea answers slowly.",
        "A neap tide at {place} leaves {a} metres of mud between the quay and the channel.",
        "The keeper writes the height of the water every {c} minutes and the wind every hour.",
        "When the air pressure falls by one hectopascal the sea stands about one centimetre higher.",
        "Pilots add {small} decimetres to the chart depth before they bring a barge over the bar.",
        "The ebb runs for {a} hours in the estuary, longer than the flood, since the river pushes with it.",
        "A harmonic table for {place} needs {c} constituents, of which four carry most of the height.",
        "Storm surges travel along the coast and reach {place} {small} hours after the first station.",
        "Fishermen who cannot read a table know the tide from the lean of the moored boats.",
        "In the year of the great survey the lowest water was {a} centimetres below the zero of the chart.",
        "Where two channels meet the stream turns first in the shallow one and {c} minutes later in the deep one.",
    ],
    "soil": [
        "A handful of loam from {place} holds about {a} percent sand and {c} percent clay.",
        "Worms move the soil of a meadow upwards, and in {c} years a stone sinks by a hand's breadth.",
        "Lime raises the pH slowly, so the field was treated {small} times before the beans were sown.",
        "The dark layer is {a} centimetres deep on the slope and twice as deep in the hollow.",
        "Water leaves the coarse ground within {small} days, while the clay stays wet for weeks.",
        "Roots of lucerne were found at a depth of {a} decimetres under the old field near {place}.",
        "Every harvest takes nitrogen away, and clover brings some of it back from the air.",
        "The farmer divides his land into {small} parts and lets one of them rest each year.",
        "A sieve of {c} holes per square separates gravel from the fine earth that is weighed.",
        "Frost breaks the clods, which is why heavy land is ploughed before the winter.",
        "After {c} millimetres of rain the ditch at {place} carried brown water for a week.",
        "Compost feeds the small animals of the soil first and the plants only through them.",
    ],
    "bridges": [
        "The bridge at {place} spans {c} metres with {small} arches of dressed stone.",
        "An arch pushes outwards, and the abutments must be heavy enough to stand against it.",
        "Rivets were replaced by bolts in {small} panels after the inspection found loose heads.",
        "The deck expands by {a} millimetres between the coldest and the hottest day.",
        "A cable of {c} wires is stronger than one thick rod, since a flaw in one wire stays there.",
        "Engineers load the span with {a} trucks of sand and measure how far it sinks.",
        "The piers stand on {c} oak piles, which last for centuries as long as they remain wet.",
        "Wind drags at the railing more than at the beams, because the railing is full of edges.",
        "Salt from the road reaches the steel through cracks that are {small} tenths of a millimetre wide.",
        "The toll house of {place} kept a list of every cart, with {a} entries on an ordinary day.",
        "Before the bridge was built a ferry crossed {small} times an hour when the water was calm.",
        "A truss divides one large bending force into many small pulls and pushes along its bars.",
    ],
    "bread": [
        "The baker at {place} mixes {a} kilograms of flour with {small} litres of water and a little salt.",
        "A sour dough that rests for {c} minutes longer tastes milder in the morning and sharper at night.",
        "Steam in the first {small} minutes keeps the crust soft, so that the loaf can still grow.",
        "Rye holds its water differently from wheat, which is why its dough sticks to the hands.",
        "The oven has {a} stones, and each of them keeps the heat of the fire for {small} hours.",
        "A loaf loses about {a} percent of its weight while it bakes and a little more as it cools.",
        "Kneading lines up the gluten, and the dough becomes smooth after {c} turns.",
        "In {place} the dough is divided into {c} pieces before sunrise and shaped by two people.",
        "Too much yeast makes bread that rises quickly and is stale on the second day.",
        "The miller grinds slowly, because hot stones spoil the flour for {small} days.",
        "A knife cut before baking decides where the crust will open.",
        "Old bread is soaked, mixed with new dough, and makes the next loaf darker.",
    ],
    "glass": [
        "The furnace of {place} melts sand, soda and lime at {c} hundred degrees.",
        "A bubble of {small} millimetres in the pane bends the light and makes the window look alive.",
        "Cobalt colours {a} kilograms of glass blue when a single spoon of it is added.",
        "Glass that cools too fast keeps a strain inside and may break {c} days later without a touch.",
        "The blower turns the pipe all the time, because the soft glass would fall to one side.",
        "For a lens the block is ground with {small} grades of sand, each finer than the one before.",
        "An annealing oven lowers its heat by {a} degrees an hour through the night.",
        "Broken pieces are collected in {place} and melted again, since they save fuel.",
        "Lead makes the glass heavy and bright, and its cut edges spread the light into colours.",
        "A master of the guild made {c} goblets a day with {small} helpers at one furnace.",
        "The first large mirrors were polished for {a} weeks before they were coated.",
        "Flat glass floats on molten tin today, which gives it two smooth faces at once.",
    ],
    "rivers": [
        "The barge from {place} carries {c} tonnes of gravel and draws {small} metres of water.",
        "A lock lifts the boat by {a} decimetres and uses the water of the upper reach for it.",
        "Groynes narrow the stream, so that it digs its own bed and needs no dredger for {small} years.",
        "At the bend the outer bank loses {a} centimetres of earth in a year and the inner bank gains them.",
        "The ferryman watches the birch at {place}, which stands in the water when the flood is dangerous.",
        "A weir with {small} gates holds the level for the mills even in a dry summer.",
        "Ice closed the river for {c} days in the hardest winter that the register knows.",
        "Signals at the narrows let {small} boats pass upstream and then as many downstream.",
        "The water needs {a} hours from the reservoir to the town, a little less after rain.",
        "Salmon climb the steps beside the weir at night, {c} of them in a good autumn.",
        "Sand moves along the bottom in waves that wander {small} metres a day.",
        "The old towpath is kept free, although no horse has pulled a boat there for generations.",
    ],
    "sorting": [
        "Merge sort divides a list of {c} names into halves until each part is sorted by itself.",
        "Inserting one more card into a sorted hand of {a} needs {small} comparisons when the place is halved.",
        "A stable sort keeps equal records in the order in which {place} sent them.",
        "The clerk sorts {c} letters by street first and by number in a second pass.",
        "Quicksort is fast on average, and slow on the list that an enemy of the program would choose.",
        "With {small} buckets the counting takes one pass over the data and no comparison at all.",
        "A heap of {c} entries answers the question for the smallest one without sorting the rest.",
        "Sorting data that does not fit in memory writes {small} runs to disk and merges them afterwards.",
        "Nearly sorted input is common, and insertion sort handles {a} entries of it in linear time.",
        "No method that only compares can use fewer than about n times the logarithm of n comparisons.",
        "The archive of {place} sorts its cards at night and reports {a} duplicates in the morning.",
        "A comparison that is not transitive breaks the sort in ways which no test of {small} items shows.",
    ],
    "hashing": [
        "A table with {c} slots is two thirds full when {a} keys have been stored.",
        "Two keys that fall into one slot are kept in a short list, usually of {small} entries or fewer.",
        "The hash of a word must not depend on the machine, or the files of {place} could not be compared.",
        "Growing the table copies every key once, so {c} insertions still cost constant time on average.",
        "A checksum of {small} bytes finds a damaged block but does not stop a clever forger.",
        "The first {a} bits of the digest choose the shard, and the rest identify the document.",
        "A filter of {c} bits says that a key is certainly absent or perhaps present.",
        "Consistent hashing moves only one part in {small} of the keys when a server joins.",
        "Names that differ in one letter should land in distant slots, which is tested with {a} pairs.",
        "The backup in {place} stores a block once, however many files contain it.",
        "A good hash treats every bit of its input alike and costs about {small} cycles a byte.",
        "Sets, caches and indexes are the same idea with different promises about memory.",
    ],
    "stars": [
        "The observers at {place} counted {c} meteors in {small} hours of a moonless night.",
        "A parallax of one tenth of a second of arc puts the star at {a} parsecs or a little less.",
        "The period of this variable is {a} days, and its brightness changes by {small} tenths.",
        "Dust between the stars makes distant suns look redder and fainter than they are.",
        "A mirror of {c} centimetres gathers the light that {a} eyes could not.",
        "Jupiter returns to the same constellation after about twelve years.",
        "The plate from {place} shows {c} nebulae, of which {small} were unknown before.",
        "Radio waves from hydrogen cross the dust and trace the arms of the galaxy.",
        "An eclipse lets us weigh the two stars of a pair that no telescope can separate.",
        "The calendar gains a day in {c} years when the leap rule is forgotten.",
        "Twinkling is made by the air, so telescopes stand on mountains {a} hundred metres high.",
        "A comet loses {small} metres of its ice each time it passes the sun.",
    ],
}

PLACES = ["Arnvik", "Belmora", "Corrin", "Dallow", "Estray", "Fenholt", "Garside", "Hulme", "Kelby", "Marrow", "Ostry"]

WEB = [
    "Welcome to the pages of the {place} sailing club. We meet every {small}th evening and newcomers are welcome.",
    "Opening hours: the shop in {place} is open from {small} to {a} o'clock, and closed on holidays.",
    "Our newsletter reaches {c} readers. Subscribe at the bottom of this page and leave whenever you want.",
    "Click on the picture to see all {a} photographs of the festival in {place}.",
    "The new season ticket costs {c} crowns. Children under {small} years enter for free with their parents.",
    "Thank you for your comments. We have answered {a} of them on the next page.",
    "Share this article with your friends, or print it with the button at the top.",
    "Getting here: take bus {small} from the station of {place} and walk for {a} minutes along the river.",
    "We deliver within {small} days. If you are not happy with your order, send it back within {a} days.",
    "Read more about the team behind the museum of {place} and the {c} volunteers who keep it open.",
    "Sign in to save your favourite recipes, or look at the {a} most popular ones of this week.",
    "Rated {small} out of ten by {c} visitors, the hotel at {place} is a quiet place for the weekend.",
]


CODE = [
    """def ${verb}_${noun}s(${noun}s, limit=$limit):
    result = []
    for index, $noun in enumerate(${noun}s):
        if index % $step == 0 and $noun is not None:
            result.append($noun)
    return result[:limit]
""",
    """class ${noun}_queue:
    def __init__(self, size=$limit):
        self.size = size
        self.items = []

    def push(self, $noun):
        if len(self.items) >= self.size:
            raise OverflowError($noun)
        self.items.append($noun)

    def pop(self):
        return self.items.pop(0)
""",
    """def ${noun}_histogram(values):
    counts = {}
    for value in values:
        key = value // $step
        counts[key] = counts.get(key, 0) + 1
    return sorted(counts.items())
""",
    """def find_$noun(${noun}s, key):
    low, high = 0, len(${noun}s)
    while low < high:
        middle = (low + high) // 2
        if ${noun}s[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low
""",
    """async def fetch_$noun(client, name, retries=$step):
    for attempt in range(retries):
        try:
            return await client.get(f"/${noun}s/{name}")
        except TimeoutError:
            continue
    raise LookupError(name)
""",
    """LIMITS = $limits


def check_$noun(value):
    return any(value < limit for limit in LIMITS[:$step])
""",
]


def fill(rng: random.Random, template: str) -> str:
    return template.format(
        place=rng.choice(PLACES),
        a=rng.randint(11, 48),
        b=rng.randint(0, 9),
        c=rng.randint(50, 400),
        small=rng.randint(2, 9),
    )


def prose(rng: random.Random, topic: list[str], sentences: int) -> str:
    lines = [fill(rng, template) for template in rng.sample(topic, sentences)]
    half = len(lines) // 2
    return " ".join(lines[:half]) + "\n\n" + " ".join(lines[half:])


def mathematics(rng: random.Random) -> str:
    """A worked computation whose every line is true."""
    a, b, c, n = (rng.randint(2, 40) for _ in range(4))
    steps = [
        f"Let a = {a}, b = {b} and c = {c}. Then a + b = {a + b} and the product of a and b is {a * b}.",
        f"By the distributive law c(a + b) = {c} * {a + b} = {c * (a + b)}, which equals {c * a} + {c * b}.",
        f"The square of the sum is (a + b)^2 = a^2 + 2ab + b^2 = {a * a} + {2 * a * b} + {b * b} = {(a + b) ** 2}.",
        f"The sum of the first n = {n} integers is n(n + 1)/2 = {n * (n + 1) // 2}, and of their squares "
        f"n(n + 1)(2n + 1)/6 = {n * (n + 1) * (2 * n + 1) // 6}.",
        f"Modulo {n} the number {a * b} leaves the remainder {a * b % n}, "
        f"since {a * b} = {a * b // n} * {n} + {a * b % n}.",
        f"The equation x^2 - {a + b} x + {a * b} = 0 has the roots x = {a} and x = {b} by Vieta's theorem.",
        f"The difference of two squares gives {a}^2 - {b}^2 = ({a} - {b})({a} + {b}) = {a * a - b * b}.",
        f"The derivative of f(x) = {a} x^3 + {b} x is f'(x) = {3 * a} x^2 + {b}, "
        f"so that f'({c}) = {3 * a * c * c + b}.",
        f"An arithmetic series with first term {a} and step {b} has the {n}th term "
        f"{a} + {n - 1} * {b} = {a + (n - 1) * b}.",
        f"For the vector (x, y) = ({a}, {b}) the squared length is x^2 + y^2 = {a * a + b * b}, "
        f"and 2x + 3y = {2 * a + 3 * b}.",
    ]
    return (
        "Exercise and solution.\n\n"
        + "\n".join(rng.sample(steps, 7))
        + "\n\nThis proves the claim and completes the proof."
    )


def code(rng: random.Random) -> str:
    names = {
        "noun": rng.choice(["order", "packet", "sample", "record", "vertex", "token", "window", "ledger"]),
        "verb": rng.choice(["merge", "filter", "count", "rotate", "split", "encode", "rank", "pair"]),
        "limit": rng.randint(3, 99),
        "step": rng.randint(2, 9),
        "limits": [rng.randint(1, 999) for _ in range(8)],
    }
    functions = [Template(text).substitute(names) for text in rng.sample(CODE, 4)]
    return "import json\nimport sys\n\n\n" + "\n\n".join(functions)


def near_duplicate(rng: random.Random, text: str) -> str:
    """One word changed and the line breaks lost, as copies of a page differ."""
    words = text.split()
    words[rng.randrange(len(words))] = "somewhat"
    return " ".join(words)


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    rng = random.Random(20260917)
    topics = [(name, prose(rng, PROSE[name], 9)) for name in PROSE for _ in range(11)]
    rng.shuffle(topics)
    rows = [{"id": f"{name}-{number}", "text": text} for number, (name, text) in enumerate(topics)]
    copies = [dict(rows[i], id=f"copy-{i}", text=rows[i]["text"].replace("\n\n", "\n\n\n") + "  ") for i in (3, 17, 40)]
    near = [{"id": f"near-{i}", "text": near_duplicate(rng, rows[i]["text"])} for i in (5, 8, 21, 33)]
    damaged = [
        b'{"id": "cut", "text": "this line ends early\n',
        b'["no", "object"]\n',
        b'{"text": 7}\n',
        b'{"text": " "}\n',
    ]
    damaged.append(b'{"text": "caf\xe9"}\n')
    short = [{"text": "Too short to keep."}, {"text": "water mill stone " * 30}]
    files = {
        "articles.jsonl": lines(rows) + b"".join(damaged),
        "copies.jsonl.gz": gzip.compress(lines([*copies, *near, *short]), mtime=0),
        "mathematics.jsonl": lines([{"text": mathematics(rng)} for _ in range(32)]),
        "web.jsonl": lines([{"text": prose(rng, WEB, 8)} for _ in range(16)]),
        "code.jsonl": lines([{"text": code(rng)} for _ in range(28)]),
        "notes/weather.md": b"# Weather at the harbour\n\n" + prose(rng, PROSE["tides"], 10).encode(),
        "notes/fields.rst": b"Fields\n======\n\n" + prose(rng, PROSE["soil"], 10).encode(),
        "notes/latin.txt": "Ein Brief aus Köln über Brücken.\n".encode("latin-1"),
        "notes/windows.txt": ("\ufeff" + prose(rng, PROSE["bridges"], 10).replace("\n", "\r\n")).encode(),
        "notes/figure.bin": bytes(range(64)),
        "page.html": _page(rng).encode(),
    }
    for name, data in files.items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _page(rng: random.Random) -> str:
    paragraphs = "".join(f"<p>{text}</p>\n" for text in prose(rng, PROSE["rivers"], 10).split("\n\n"))
    script = "<script>var hidden = 'never shown';</script>"
    return f"<html><head><title>River</title>{script}</head><body><h1>On the river</h1>\n{paragraphs}</body></html>\n"


if __name__ == "__main__":
    main()
