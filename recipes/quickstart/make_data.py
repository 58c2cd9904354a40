"""Writes the quick start's rows: an order in free text, and the same order as strict JSON.

    python recipes/quickstart/make_data.py

300 rows to train on and 60 held out. No name, place or item of the held-out rows occurs in training: what is learnt
is the task, not the words. Half of the training words are made of syllables, so that only copying gets them right.
The seeds make the files the same each time.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

SYLLABLES = (
    "ba be bi bo bra ca co da de di do dra fa fe fi fo ga ge go gra ha he hi ho ja je jo ka ke ki ko la le li lo lu ma "
    "me mi mo mu na ne ni no nu pa pe pi po pra ra re ri ro ru sa se si so sta ta te ti to tra va ve vi"
).split()
NAME_ENDS = "n na ra lia vin mir sha ton dra lle nda rik s bert mund wen".split()
PLACE_ENDS = "burg ford ville stad mouth dorf gate haven field bridge port wick".split()
NAMES = (
    "Marta Jonas Aisha Pedro Ingrid Tomas Leila Hugo Sofia Emil Nadia Victor Greta Omar Felix Anton Lucia Boris".split()
)
PLACES = (
    "Lisbon Oslo Cairo Prague Geneva Milan Athens Warsaw Tunis Zurich Lyon Porto Naples Seville Bergen Krakow".split()
)

ADJECTIVES = (
    "oak steel glass wool clay pine brass linen copper leather silver cotton marble bamboo velvet iron red blue green "
    "yellow black white grey purple small large round square heavy light folding striped painted wooden plain carved "
    "polished woven quilted printed lacquered knitted engraved frosted glazed hammered padded varnished maple cedar "
    "titanium aluminium porcelain acrylic cardboard cork denim felt gold jute limestone mahogany nylon onyx plywood "
    "rattan sandstone suede teak vinyl wicker zinc crystal concrete birch ebony hemp ivory jade mohair nickel pewter "
    "quartz satin slate tweed turquoise crimson beige magenta scarlet violet indigo slender rugged glossy curly hollow"
).split()
THINGS = (
    "chairs lamps bowls rugs vases desks bells towels pans belts spoons shirts tiles mats curtains hooks boxes cups "
    "forks jars kettles ladders mops nets ovens pipes quilts ropes sinks trays umbrellas wheels brushes cushions "
    "drawers envelopes fans gloves hammers jackets keyrings lanterns mugs needles pillows radios saddles teapots "
    "anchors badges cabinets dishes easels flags goblets hinges inkwells jugs kites ledgers magnets notebooks "
    "ornaments paddles racks scissors thimbles urns valves whistles yokes zippers benches coasters figurines ribbons"
).split()

HELD_OUT_NAMES = "Emma Oliver Hannah Daniel Laura Simon Alice Peter Julia Martin Sarah David Anna Robert Clara".split()
HELD_OUT_PLACES = "London Paris Berlin Boston Chicago Dublin Vienna Sydney Toronto Madrid Denver Austin".split()
HELD_OUT_ADJECTIVES = (
    "golden modern vintage simple bright dark thick thin soft warm plastic orange narrow curved".split()
)
HELD_OUT_THINGS = "tables plates mirrors blankets candles buckets frames shelves helmets tents baskets clocks".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

SENTENCES = (
    "Hello, this is {name} in {place}. Please send me {quantity} {item} by {day}.",
    "I need {quantity} {item} on {day}. Deliver to {place}, and the name is {name}.",
    "{name} here. Could {quantity} {item} reach {place} before {day}?",
    "For {day}: {quantity} {item} to {place}. Thanks, {name}",
    "My name is {name} and I live in {place}; I would like {quantity} {item}, on {day} if possible.",
    "Can you ship {quantity} {item} to {place}? It must be there on {day}. Regards, {name}",
)

Order = dict[str, object]

SYSTEM = "Write the order as JSON."


def made_up(draw: random.Random, ends: list[str]) -> str:
    return ("".join(draw.sample(SYLLABLES, 2)) + draw.choice(ends)).capitalize()


def training_order(draw: random.Random) -> Order:
    """An order of ordinary and made-up words."""

    def word(ordinary: list[str], ends: list[str]) -> str:
        return draw.choice(ordinary) if draw.random() < 0.5 else made_up(draw, ends)

    return order(
        draw, word(NAMES, NAME_ENDS), word(PLACES, PLACE_ENDS), word(ADJECTIVES, NAME_ENDS), draw.choice(THINGS)
    )


def held_out_order(draw: random.Random) -> Order:
    """An order none of whose words is known."""
    words = (HELD_OUT_NAMES, HELD_OUT_PLACES, HELD_OUT_ADJECTIVES, HELD_OUT_THINGS)
    return order(draw, *(draw.choice(choices) for choices in words))


def order(draw: random.Random, name: str, place: str, adjective: str, thing: str) -> Order:
    quantity, day = draw.randint(2, 60), draw.choice(DAYS)
    return {"name": name, "place": place, "item": f"{adjective} {thing}", "quantity": quantity, "day": day}


def write(path: Path, count: int, make: Callable[[random.Random], Order], seed: int) -> None:
    """`count` conversations, one a line: an order in a sentence, and as JSON."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            made = make(draw)
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": draw.choice(SENTENCES).format(**made)},
                {"role": "assistant", "content": json.dumps(made)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main(folder: Path) -> None:
    write(folder / "train.jsonl", 300, training_order, seed=1)
    write(folder / "held_out.jsonl", 60, held_out_order, seed=2)


if __name__ == "__main__":
    main(Path(__file__).parent)
