"""The captions: one or two objects on a background, and nothing else.

    caption    = object [relation object] ", " background " background"
    object     = "a " ["striped "] colour " " shape

A caption is held out when one of its objects, together with the background, belongs to a fixed eighth of all
(striped, colour, shape, background) combinations. Training never draws such a caption, so the figures on held-out
captions say whether the model combines words or remembers pictures.
"""

import itertools
import random
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "ring", "star")
BACKGROUNDS = ("sunset", "sky", "night", "field", "desert")
RELATIONS = ("left of", "right of", "above", "below")

WORDS = ("a", "striped", ",", "background", "left", "right", "of", "above", "below", *COLOURS, *SHAPES, *BACKGROUNDS)


@dataclass(frozen=True)
class Thing:
    """One object of a caption."""

    colour: str
    shape: str
    striped: bool = False

    def __str__(self):
        return f"a {'striped ' if self.striped else ''}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """What a picture shows. `relation` tells where the first thing lies, seen from the second."""

    background: str
    first: Thing
    relation: str | None = None
    second: Thing | None = None

    def __str__(self):
        objects = f"{self.first} {self.relation} {self.second}" if self.second else str(self.first)
        return f"{objects}, {self.background} background"

    @property
    def things(self):
        return (self.first, self.second) if self.second else (self.first,)


def parse(text):
    """Read a caption back: `parse(str(caption)) == caption`.

    Raises: ValueError for a text that the grammar does not make.
    """
    objects, _, background = text.strip().lower().removesuffix(" background").rpartition(", ")
    relation = next((name for name in RELATIONS if f" {name} " in objects), None)
    parts = objects.split(f" {relation} ") if relation else [objects]
    if background not in BACKGROUNDS or len(parts) > 2:
        raise ValueError(f"not a caption of this grammar: {text!r}; see the top of grammar.py")
    return Caption(background, _parse_thing(parts[0]), relation, _parse_thing(parts[1]) if relation else None)


def _parse_thing(text):
    words = text.split()
    striped = len(words) == 4 and words[1] == "striped"
    if len(words) != 3 + striped or words[0] != "a" or words[-2] not in COLOURS or words[-1] not in SHAPES:
        raise ValueError(f"not an object of this grammar: {text!r}; one is 'a striped red star'")
    return Thing(words[-2], words[-1], striped)


def is_held_out(caption):
    """Whether training leaves this caption out."""
    return any(_in_held_out_eighth(thing, caption.background) for thing in caption.things)


def _in_held_out_eighth(thing, background):
    # The multipliers spread the eighth evenly: each colour, shape and background keeps most of its combinations.
    number = COLOURS.index(thing.colour) + 3 * SHAPES.index(thing.shape) + 5 * BACKGROUNDS.index(background)
    return (number + 4 * thing.striped) % 8 == 0


def all_one_object():
    """Every caption with one object, in a fixed order: 350 of them."""
    choices = itertools.product(BACKGROUNDS, COLOURS, SHAPES, (False, True))
    return [Caption(background, Thing(colour, shape, striped)) for background, colour, shape, striped in choices]


def sample(rng, num_objects=None, held_out=False, two_share=0.5):
    """Draw one caption from the training captions, or from the held-out ones.

    Args:
        rng: a `random.Random`.
        num_objects: 1 or 2; None draws it, 2 with probability `two_share`.
    Two things of one caption differ in colour; three in ten are striped.
    """
    while True:
        two = rng.random() < two_share if num_objects is None else num_objects == 2
        first, second = _sample_thing(rng), _sample_thing(rng)
        if two and first.colour == second.colour:
            continue
        relation = rng.choice(RELATIONS)
        background = rng.choice(BACKGROUNDS)
        caption = Caption(background, first, relation, second) if two else Caption(background, first)
        if is_held_out(caption) == held_out:
            return caption


def _sample_thing(rng):
    return Thing(rng.choice(COLOURS), rng.choice(SHAPES), rng.random() < 0.3)


def held_out_set(num_captions, num_objects, seed=0):
    """The fixed test captions: `num_captions` held-out ones with `num_objects` objects, different while that lasts."""
    rng = random.Random(f"held out {num_objects} {seed}")
    if num_objects == 1:
        pool = [caption for caption in all_one_object() if is_held_out(caption)]
        rng.shuffle(pool)
        return [pool[i % len(pool)] for i in range(num_captions)]
    pool = {}
    while len(pool) < num_captions:
        pool[sample(rng, num_objects=2, held_out=True)] = None
    return list(pool)
