"""Writes the quick start's rows: an order in free text, and the same order as strict JSON.

    python recipes/quickstart/make_data.py

300 rows to train on and 60 held out. No name, place or item of the held-out rows occurs in training: what is learnt
is the task, not the words. The seed makes the files the same each time.
"""

import json
import random
from pathlib import Path

# Names and places are made of syllables, so that nearly every row has its own and only copying gets them right.
SYLLABLES = "ba be bo da de di fa fe ga go ha he ja jo ka ke la le li lo ma me mi mo na ne ni no pa pe ra re ri ro".split()
NAME_ENDS = "n na ra lia vin mir sha ton dra lle s rik".split()
PLACE_ENDS = "burg ford ville stad mouth dorf gate haven field bridge port wick".split()

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

HELD_OUT_ADJECTIVES = "walnut ceramic plastic silk granite rubber paper bronze orange narrow curved sturdy".split()
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

SYSTEM = "Write the order as JSON."


def made_of_syllables(draw: random.Random, ends: list[str]) -> str:
    return ("".join(draw.sample(SYLLABLES, draw.randint(1, 2))) + draw.choice(ends)).capitalize()


def orders(count: int, adjectives: list[str], things: list[str], seed: int, without: set[str]) -> list[dict[str, object]]:
    """`count` orders whose names and places are not in `without`."""
    draw = random.Random(seed)

    def fresh(ends: list[str]) -> str:
        while (word := made_of_syllables(draw, ends)) in without:
            pass
        return word

    return [
        {
            "name": fresh(NAME_ENDS),
            "place": fresh(PLACE_ENDS),
            "item": f"{draw.choice(adjectives)} {draw.choice(things)}",
            "quantity": draw.randint(2, 60),
            "day": draw.choice(DAYS),
        }
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict[str, object]], seed: int) -> None:
    """One conversation a line: the order in a sentence, and as JSON."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for order in rows:
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": draw.choice(SENTENCES).format(**order)},
                {"role": "assistant", "content": json.dumps(order)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main(folder: Path) -> None:
    train = orders(300, ADJECTIVES, THINGS, seed=1, without=set())
    known = {str(order[field]) for order in train for field in ("name", "place")}
    held_out = orders(60, HELD_OUT_ADJECTIVES, HELD_OUT_THINGS, seed=2, without=known)
    write(folder / "train.jsonl", train, seed=3)
    write(folder / "held_out.jsonl", held_out, seed=4)


if __name__ == "__main__":
    main(Path(__file__).parent)
