"""Draws coloured shapes, and asks about them: `python recipes/shapes/draw.py FOLDER` writes rows.jsonl and its images.

80 rows of the format that `qft train` reads: messages whose parts are images, named by their paths beside the file.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "yellow": "#ffdd00"}
SHAPES = ("circle", "square", "triangle", "bar")
QUESTIONS = {"What colour is it?": 0, "What shape is it?": 1}
SIZE = 28
"""Of an image, in pixels a side."""


def draw(colour: str, shape: str, place: random.Random) -> Image.Image:
    """The shape somewhere on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen, side = ImageDraw.Draw(image), place.randint(20, 24)
    left, top = place.randint(1, SIZE - side - 2), place.randint(1, SIZE - side - 2)
    box = (left, top, left + side, top + side)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "triangle":
        pen.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=COLOURS[colour])
    else:
        thin = side // 3 if shape == "bar" else 0
        pen.rectangle((left, top + thin, left + side, top + side - thin), fill=COLOURS[colour])
    return image


def write(folder: Path, questions: dict[str, int] = QUESTIONS, count: int = 80, seed: int = 0) -> Path:
    """Write `count` rows and their images; returns the file of rows."""
    place, lines = random.Random(seed), []  # nothing is kept secret
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        answers = pairs[number % len(pairs)]
        name = f"{number:02}.png"
        draw(*answers, place).save(folder / name)
        question = place.choice(list(questions))
        asked = [{"type": "image", "image": name}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answers[questions[question]]}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), "utf-8")
    return folder / "rows.jsonl"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
