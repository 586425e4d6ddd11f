"""The demo's corpus: short stories from a grammar, so that the demo needs no download and knows what it taught.

Every story opens with one sentence (the prompt) and goes on with happy, plain and sad sentences in equal parts; the
demo's reward counts the happy words less the sad ones.
"""

import random
import re

ANIMALS = ("fox", "bear", "cat", "dog", "frog", "mouse", "owl", "duck", "rabbit", "goat", "pony", "bee")
GIRLS = ("Mia", "Lily", "Zoe", "Anna", "Ruby", "Nora")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn")
PLACES = ("forest", "river", "garden", "beach", "farm", "hill", "market", "lake", "meadow", "village")
THINGS = ("ball", "kite", "boat", "shell", "drum", "hat", "lamp", "book", "cup", "stone")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown")

OPENINGS = (
    "One day, {name} the {animal} went to the {place}.",
    "{name} was a little {animal} who lived near the {place}.",
    "In the morning, {name} the {animal} walked to the {place}.",
    "{name} the {animal} had a {colour} {thing}.",
)
SENTENCES = {
    "happy": (
        "{He} found a {lovely} {thing} and smiled.",
        "{He} played with a friend and they laughed.",
        "A kind {animal} gave {him} a hug.",
        "It was a {lovely} day and {he} was happy.",
        "{He} danced and sang by the {place}.",
        "They shared a {lovely} cake with love.",
        "{He} won a prize and felt proud.",
    ),
    "plain": (
        "{He} looked at a {colour} {thing}.",
        "There was a {animal} near the {place}.",
        "{He} put the {thing} next to the {thing2}.",
        "The {place} was not far from the {place2}.",
        "Then {he} walked to the {place}.",
        "{He} asked the {animal} about the {thing}.",
        "The {thing} was {colour} and the {thing2} was {colour2}.",
    ),
    "sad": (
        "{He} lost the {thing} and cried.",
        "{He} fell into the mud and was hurt.",
        "An angry {animal} broke the {thing}.",
        "It was a {gloomy} day and {he} was sad.",
        "{He} was afraid and alone near the {place}.",
        "The {gloomy} rain took the {thing} and {he} wept.",
        "{He} felt lonely and had many tears.",
    ),
}
LOVELY = ("lovely", "sunny", "wonderful", "beautiful")
GLOOMY = ("gloomy", "dark", "cold", "terrible")

HAPPY_WORDS = frozenset(
    (*LOVELY, *["smiled", "laughed", "kind", "hug", "happy", "danced", "sang", "love", "prize", "proud", "friend"])
)
SAD_WORDS = frozenset(
    (*GLOOMY, *["lost", "cried", "fell", "hurt", "angry", "broke", "sad", "afraid", "alone", "lonely", "tears", "wept"])
)


def happiness(text: str) -> float:
    """Different happy words less different sad words. Different ones: else 'kind kind kind kind' is the best story."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return float(len(words & HAPPY_WORDS) - len(words & SAD_WORDS))


def _fill(template: str, name: str, girl: bool, rng: random.Random) -> str:
    thing, thing2 = rng.sample(THINGS, 2)
    place, place2 = rng.sample(PLACES, 2)
    colour, colour2 = rng.sample(COLOURS, 2)
    he, him = ("she", "her") if girl else ("he", "him")
    text = template.format(
        name=name,
        animal=rng.choice(ANIMALS),
        thing=thing,
        thing2=thing2,
        place=place,
        place2=place2,
        colour=colour,
        colour2=colour2,
        He=he.capitalize(),
        he=he,
        him=him,
        lovely=rng.choice(LOVELY),
        gloomy=rng.choice(GLOOMY),
    )
    return re.sub(r"\ba ([aeiou])", r"an \1", text)


def story(rng: random.Random, sentences: int = 4) -> tuple[str, str]:
    """(opening, continuation) of one story."""
    girl = rng.random() < 0.5
    name = rng.choice(GIRLS if girl else BOYS)
    moods = rng.choices(tuple(SENTENCES), k=sentences)
    opening = _fill(rng.choice(OPENINGS), name, girl, rng)
    return opening, " ".join(_fill(rng.choice(SENTENCES[mood]), name, girl, rng) for mood in moods)


def corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` stories; the same seed gives the same ones."""
    rng = random.Random(seed)
    return [story(rng) for _ in range(count)]
