"""What there is to say in the tiny world, and what a listener can be asked about it.

    sentence   "the farmer sold three red apples in the market yesterday"      (a handful of forms)
    digits     "three five two nine"                                            (3 to 6 digits)
    directive  "which is larger two or five"           (a question or a command, complete in itself)

A directive is answered where it is the prompt, and is content like any other where it is the
utterance that a prompt is about: "Translate this into Spanish." Every task of tasks.toml has one
function here that knows the true answer. The tiny LLM is pre-trained on these answers; stage 1 and
stage 2 never see them: they imitate what the LLM says.
"""

import hashlib
import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

TASKS_TOML = Path(__file__).with_name("tasks.toml")

# English -> Spanish. Spanish needs gender (people, objects) and agreement (colours), which makes
# translation a real task.
# fmt: off
PEOPLE = {
    "farmer": "el granjero", "teacher": "la maestra", "doctor": "el médico", "baker": "la panadera",
    "sailor": "el marinero", "artist": "la artista", "student": "el alumno",
    "driver": "la conductora", "singer": "el cantante", "waiter": "el camarero",
    "pilot": "la piloto", "nurse": "la enfermera",
}
# fmt: on
# past -> (base form, Spanish singular, Spanish plural, sentiment)
VERBS = {
    "sold": ("sell", "vendió", "vendieron", "neutral"),
    "bought": ("buy", "compró", "compraron", "neutral"),
    "carried": ("carry", "llevó", "llevaron", "neutral"),
    "painted": ("paint", "pintó", "pintaron", "neutral"),
    "found": ("find", "encontró", "encontraron", "positive"),
    "won": ("win", "ganó", "ganaron", "positive"),
    "fixed": ("fix", "arregló", "arreglaron", "positive"),
    "shared": ("share", "compartió", "compartieron", "positive"),
    "lost": ("lose", "perdió", "perdieron", "negative"),
    "broke": ("break", "rompió", "rompieron", "negative"),
    "burned": ("burn", "quemó", "quemaron", "negative"),
    "dropped": ("drop", "soltó", "soltaron", "negative"),
}
# fmt: off
COUNTS = {
    "two": "dos", "three": "tres", "four": "cuatro", "five": "cinco",
    "six": "seis", "seven": "siete", "eight": "ocho", "nine": "nueve",
}
# masculine, feminine
COLOURS = {
    "red": ("rojos", "rojas"), "green": ("verdes", "verdes"), "blue": ("azules", "azules"),
    "black": ("negros", "negras"), "white": ("blancos", "blancas"),
    "yellow": ("amarillos", "amarillas"),
}
# fmt: on
# object -> (Spanish, feminine?, category)
OBJECTS = {
    "apples": ("manzanas", True, "food"),
    "cakes": ("pasteles", False, "food"),
    "lemons": ("limones", False, "food"),
    "shirts": ("camisas", True, "clothes"),
    "hats": ("sombreros", False, "clothes"),
    "gloves": ("guantes", False, "clothes"),
    "chairs": ("sillas", True, "furniture"),
    "tables": ("mesas", True, "furniture"),
    "lamps": ("lámparas", True, "furniture"),
    "books": ("libros", False, "paper"),
    "letters": ("cartas", True, "paper"),
    "maps": ("mapas", False, "paper"),
}
# fmt: off
PLACES = {
    "market": "el mercado", "garden": "el jardín", "school": "la escuela",
    "station": "la estación", "kitchen": "la cocina", "library": "la biblioteca",
    "harbor": "el puerto", "hotel": "el hotel",
}
PREPOSITIONS = {"in": "en", "near": "cerca de", "behind": "detrás de"}
TIMES = {
    "yesterday": "ayer", "today": "hoy", "on monday": "el lunes", "on friday": "el viernes",
    "last night": "anoche", "this morning": "esta mañana",
}
# fmt: on
DIGITS = {"zero": "cero", "one": "uno", **COUNTS}
VALUE = {word: value for value, word in enumerate(DIGITS)}  # zero is 0, ..., nine is 9

SYSTEM_TURNS = ["You are a helpful assistant.", "Answer in a few words.", "You listen and answer."]


@dataclass(frozen=True)
class Sentence:
    """One sentence as its slots; `words` is what is spoken.

    A missing place or time is the empty string.
    """

    people: tuple
    verb: str
    count: str
    colour: str
    object: str
    preposition: str
    place: str
    time: str
    form: str  # order of the blocks: s = subject + verb + object, p = place, t = time

    @property
    def subject(self):
        return " and ".join("the " + person for person in self.people)

    @property
    def things(self):
        return f"{self.count} {self.colour} {self.object}"

    @property
    def where(self):
        return f"{self.preposition} the {self.place}" if self.place else ""

    def say(self, subject=None, verb=None, time=None):
        """The sentence with some blocks replaced: how rewriting tasks make their answers."""
        core = f"{subject or self.subject} {verb or self.verb} {self.things}"
        blocks = {"s": core, "p": self.where, "t": self.time if time is None else time}
        return " ".join(blocks[letter] for letter in self.form if blocks[letter])

    @property
    def words(self):
        return self.say()


@dataclass(frozen=True)
class Digits:
    names: tuple

    @property
    def words(self):
        return " ".join(self.names)


@dataclass(frozen=True)
class Directive:
    """A question or a command that needs nothing beside it."""

    words: str
    spanish: str
    reply: str  # what it asks for, where it is the prompt
    request: str  # "question" or "command"


def larger_or_smaller(rng):
    a, b = rng.sample(list(DIGITS), 2)
    word, spanish, best = rng.choice([("larger", "mayor", max), ("smaller", "menor", min)])
    return Directive(
        f"which is {word} {a} or {b}",
        f"cuál es {spanish} {DIGITS[a]} o {DIGITS[b]}",
        best(a, b, key=VALUE.get),
        "question",
    )


def before_or_after(rng):
    names = list(DIGITS)
    i = rng.randrange(9)
    low, high = names[i], names[i + 1]
    if rng.random() < 0.5:
        words, spanish, reply = f"after {low}", f"después de {DIGITS[low]}", high
    else:
        words, spanish, reply = f"before {high}", f"antes de {DIGITS[high]}", low
    return Directive(f"what comes {words}", f"qué viene {spanish}", reply, "question")


def some_things(rng):
    """(English, Spanish, category) of some things, as "red apples" or "three red apples"."""
    noun = rng.choice(list(OBJECTS))
    noun_in_spanish, feminine, category = OBJECTS[noun]
    colour = rng.choice(list(COLOURS))
    words, spanish = f"{colour} {noun}", f"{noun_in_spanish} {COLOURS[colour][feminine]}"
    if rng.random() < 0.5:
        count = rng.choice(list(COUNTS))
        words, spanish = f"{count} {words}", f"{COUNTS[count]} {spanish}"
    return words, spanish, category


def what_in_spanish(rng):
    words, spanish, _ = some_things(rng)
    return Directive(
        f"what are {words} in spanish", f"qué son {spanish} en español", spanish, "question"
    )


def what_kind(rng):
    words, spanish, category = some_things(rng)
    return Directive(
        f"what kind of thing are {words}", f"qué clase de cosa son {spanish}", category, "question"
    )


def say_twice(rng):
    words, spanish, _ = some_things(rng)
    return Directive(f"say {words} twice", f"di {spanish} dos veces", f"{words} {words}", "command")


def greet(rng):
    people = rng.sample(list(PEOPLE), rng.randint(1, 2))
    spanish = [PEOPLE[person].replace("el ", "un ").replace("la ", "una ") for person in people]
    return Directive(
        "say hello to " + " and ".join(f"a {person}" for person in people),
        "di hola a " + " y a ".join(spanish),
        "hello " + " and ".join(people),
        "command",
    )


def count_up(rng):
    names = list(DIGITS)
    first = rng.randrange(8)
    last = rng.randint(first + 1, min(9, first + 4))
    low, high = names[first], names[last]
    return Directive(
        f"count from {low} to {high}",
        f"cuenta de {DIGITS[low]} a {DIGITS[high]}",
        " ".join(names[first : last + 1]),
        "command",
    )


# Directives that ask for what one can only know from having read it, like what comes before six;
# of these the held-out ones were never answered in pre-training.
ASKS_FOR_A_FACT = re.compile("what comes|count from")
DIRECTIVES = (
    larger_or_smaller,
    before_or_after,
    what_in_spanish,
    what_kind,
    say_twice,
    greet,
    count_up,
)
KINDS = {"sentence": 0.5, "digits": 0.35, "directive": 0.15}  # and how often each is drawn


def kind_of(u):
    """The kind of an utterance, a key of KINDS."""
    return {Sentence: "sentence", Digits: "digits", Directive: "directive"}[type(u)]


def draw(rng, kind=None):
    """One random Sentence, Digits or Directive from `rng` (random.Random)."""
    kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
    if kind == "directive":
        return rng.choice(DIRECTIVES)(rng)
    if kind == "digits":
        return Digits(tuple(rng.choice(list(DIGITS)) for _ in range(rng.randint(3, 6))))
    people = tuple(rng.sample(list(PEOPLE), 2 if rng.random() < 0.25 else 1))
    # Two people come with a place or a time, never both: the sentence stays short.
    if len(people) == 1:
        has_place, has_time = rng.choice([(1, 1), (1, 1), (1, 0), (0, 1)])
    else:
        has_place, has_time = rng.choice([(1, 0), (0, 1)])
    return Sentence(
        people=people,
        verb=rng.choice(list(VERBS)),
        count=rng.choice(list(COUNTS)),
        colour=rng.choice(list(COLOURS)),
        object=rng.choice(list(OBJECTS)),
        preposition=rng.choice(list(PREPOSITIONS)),
        place=rng.choice(list(PLACES)) if has_place else "",
        time=rng.choice(list(TIMES)) if has_time else "",
        form=rng.choice(["spt", "tsp", "pst", "spt"]),
    )


def is_held_out(utterance):
    """Whether it is kept for testing, as one utterance in eight is, by a hash of its words.

    Such an utterance is in no training set, in any stage, for any seed.
    """
    return hashlib.sha256(utterance.words.encode()).digest()[0] < 32


def draws(seed, held_out, kind=None):
    """An endless stream of utterances of one side of the train/test split."""
    rng = random.Random(f"world-{seed}-{held_out}-{kind}")
    while True:
        utterance = draw(rng, kind)
        if is_held_out(utterance) == held_out:
            yield utterance


def spanish(u):
    """The utterance in Spanish, its blocks in the same order."""
    if isinstance(u, Directive):
        return u.spanish
    if isinstance(u, Digits):
        return " ".join(DIGITS[name] for name in u.names)
    noun, feminine, _ = OBJECTS[u.object]
    verb = VERBS[u.verb][2 if len(u.people) > 1 else 1]
    subject = " y ".join(PEOPLE[person] for person in u.people)
    things = f"{COUNTS[u.count]} {noun} {COLOURS[u.colour][feminine]}"
    core = f"{subject} {verb} {things}"
    place = ""
    if u.place:
        place = f"{PREPOSITIONS[u.preposition]} {PLACES[u.place]}".replace("de el ", "del ")
    blocks = {"s": core, "p": place, "t": TIMES.get(u.time, "")}
    return " ".join(blocks[letter] for letter in u.form if blocks[letter])


def question(u):
    """The question the sentence answers; its place and time, where it has them, come last."""
    blocks = [f"who {u.verb} {u.things}", u.where, u.time]
    return " ".join(block for block in blocks if block)


def sorted_names(u, down=False):
    return " ".join(sorted(u.names, key=VALUE.get, reverse=down))


# The true answer of each task. `u` is a Sentence or a Digits; tasks.toml says by a pattern which
# transcripts a task is for.
ANSWERS = {
    "repeat": lambda u: u.words,
    "translate": spanish,
    "last_word": lambda u: u.words.split()[-1],
    "first_word": lambda u: u.words.split()[0],
    "word_count": lambda u: str(len(u.words.split())),
    # sentences
    "keywords": lambda u: f"{u.people[0]} {u.verb} {u.object}",
    "who": lambda u: u.subject,
    "where": lambda u: u.where or "nowhere",
    "when": lambda u: u.time or "not said",
    "what": lambda u: u.things,
    "how_many": lambda u: u.count,
    "colour": lambda u: u.colour,
    "category": lambda u: OBJECTS[u.object][2],
    "sentiment": lambda u: VERBS[u.verb][3],
    "question": question,
    "negate": lambda u: u.say(verb=f"did not {VERBS[u.verb][0]}"),
    "future": lambda u: u.say(verb=f"will {VERBS[u.verb][0]}", time="tomorrow" if u.time else ""),
    "summary": lambda u: f"{u.subject} {u.verb} {u.object}",
    "continue": lambda u: f"then {u.subject} put the {u.object} in a {u.colour} box",
    # directives, where they are content
    "request": lambda u: u.request,
    # digits
    "numerals": lambda u: " ".join(str(VALUE[name]) for name in u.names),
    "smallest": lambda u: min(u.names, key=VALUE.get),
    "largest": lambda u: max(u.names, key=VALUE.get),
    "sort": lambda u: sorted_names(u),
    "sort_down": lambda u: sorted_names(u, down=True),
    "reverse": lambda u: " ".join(reversed(u.names)),
    "ends": lambda u: f"{u.names[0]} {u.names[-1]}",
    "parity": lambda u: "odd" if VALUE[u.names[-1]] % 2 else "even",
}


def read_task_table():
    """The tiny world's task table, tasks.toml.

    {name: {"split", "metric", "transcripts", "prompts", "unseen_prompts"}}
    """
    return tomllib.loads(TASKS_TOML.read_text(encoding="utf-8"))
