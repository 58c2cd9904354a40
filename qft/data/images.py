"""Images of rows: where a row names one, what it names, and the picture behind that.

A picture is kept as one text, its reference: the path of a file, or a data URI that holds it.
"""

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from qft.data.sources import BadRow
from qft.errors import DataError, first_line

Message = dict[str, Any]
KINDS = ("image", "image_url")
"""Types of parts that are images: as Hugging Face and as OpenAI have it."""
SOURCES = ("image", "image_url", "url", "path", "base64")
"""Fields of such a part, or of an image in a column, that name it."""
COLUMNS = ("images", "image")
"""Fields of a row that name images beside its turns."""
MARK = "<image>"
"""Where, in turns of text alone, an image of a column stands."""
URI = re.compile(r"data:[^,]*,", re.ASCII)
EXTRA = "pip install 'qft[images]'"
Named = tuple[str, Any]
"""Where a row names an image, and what it says there."""


def is_image(part: Any) -> bool:
    """Whether it is a part of a message that stands for an image."""
    return isinstance(part, Mapping) and part.get("type") in KINDS


def count_images(messages: Sequence[Message]) -> int:
    """Parts that are images."""
    contents = (message["content"] for message in messages)
    return sum(is_image(part) for content in contents if isinstance(content, list) for part in content)


def taken(messages: Sequence[Message], places: Sequence[str], column: Sequence[Named]) -> list[Named]:
    """Each image of a row's messages, in their order, with those of its `column`; the messages' parts are left without
    what they name. Raises BadRow for more or fewer in the column than the messages have places for."""
    parts = [
        (f"{place}.{number}", message["role"], part)
        for message, place in zip(messages, places, strict=True)
        if isinstance(message["content"], list)
        for number, part in enumerate(message["content"])
        if is_image(part)
    ]
    rest, found = iter(column), list[Named]()
    for place, role, part in parts:
        if role == "assistant":
            raise BadRow(f"{place}: an image cannot be learnt, so the assistant shows none")
        own = next(((f"{place}.{name}", part[name]) for name in SOURCES if part.get(name)), None)
        given = own or next(rest, None)
        if given is None:
            raise BadRow(f"{place}: names no image, and the row has none left in images")
        found.append(given)
        part.clear()
        part["type"] = "image"
    if left := list(rest):
        raise BadRow(f"{left[0][0]}: the messages have no place for it; {len(parts)} of their parts are images")
    return found


def placed(messages: Sequence[Message], count: int) -> list[Message]:
    """Messages of text alone with parts for `count` images: at MARK, or else in front of the first question."""
    marks = sum(message["content"].count(MARK) for message in messages if isinstance(message["content"], str))
    if any(isinstance(message["content"], list) for message in messages):
        return [dict(message) for message in messages]
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    made = []
    for number, message in enumerate(messages):
        texts = message["content"].split(MARK) if marks else [message["content"]]
        parts: list[Any] = [{"type": "image"}] * (count if number == first and not marks else 0)
        for i, text in enumerate(texts):
            parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text.strip())
        seen = any(map(is_image, parts))
        made.append({**message, "content": [dict(part) for part in parts]} if seen else dict(message))
    return made


def reference(named: Named, folder: Path | None) -> str:
    """What is kept of an image; `folder` is that of the row's file, None: it has none. Raises BadRow."""
    place, value = named
    while isinstance(value, Mapping):
        if isinstance(content := value.get("bytes"), bytes):
            return _uri(content)
        name = next((name for name in SOURCES if value.get(name)), None)
        if name is None:
            raise BadRow(f"{place}: names no image by {', '.join(SOURCES)} or bytes")
        place, value = f"{place}.{name}", value[name]
    if isinstance(value, bytes):
        return _uri(value)
    if not isinstance(value, str):
        raise BadRow(f"{place}: needs a path or a data URI, not {type(value).__name__}")
    if place.endswith(".base64"):
        return f"data:image;base64,{value}"
    if value.startswith("data:"):
        return value
    if re.match(r"https?://", value):
        raise BadRow(f"{place}: {value}: nothing is fetched from a network; save it beside the rows and name its path")
    path = Path(value.removeprefix("file://"))
    if folder is None and not path.is_absolute():
        raise BadRow(f"{place}: {value}: a data set of the hub has no folder here; it must hold its images itself")
    return str(path if folder is None else folder / path)


def content_of(kept: str) -> bytes:
    """The bytes of an image file. Raises OSError or ValueError."""
    if not kept.startswith("data:"):
        return Path(kept).read_bytes()
    head = URI.match(kept)
    if head is None:
        raise ValueError("a data URI has a comma before what it holds")
    if ";base64" not in head[0]:
        return unquote_to_bytes(kept[head.end() :])
    return base64.b64decode(kept[head.end() :], validate=True)


def open_image(kept: str) -> tuple[Any, str]:
    """The picture, a PIL.Image in RGB as it is to be looked at, and the SHA-256 of its file. Raises BadRow if it is not
    to be had, DataError without Pillow."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError(f"rows hold images, and Pillow is not installed: {EXTRA}") from None
    try:
        content = content_of(kept)
        with Image.open(io.BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise BadRow(f"{shown(kept)}: no such image") from None
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRow(f"{shown(kept)}: cannot be read as an image: {first_line(error)}") from None
    return image, hashlib.sha256(content).hexdigest()


def shown(kept: str) -> str:
    """A reference as messages have it."""
    return f"{kept[:32]}… ({len(kept):,} characters)" if kept.startswith("data:") and len(kept) > 32 else kept


def _uri(content: bytes) -> str:
    return f"data:image;base64,{base64.b64encode(content).decode()}"
