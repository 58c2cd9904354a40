"""What a model reads of the images of rows: its own processor, with the tokenizer of the plan.

A processor writes a text of its own in the place of each image (tokens that the image's features then take the place
of). What stands around those is left alone, so each character of the text as it was rendered has its place in the text
that the model reads: that is looked at for every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from qft.data.images import EXTRA, open_image
from qft.data.sources import BadRow
from qft.errors import DataError, first_line

READ = ("input_ids", "attention_mask")
"""What a row keeps itself of what a processor makes."""


@dataclass(frozen=True)
class Expanded:
    """A rendered text as the model reads it, with its images."""

    text: str
    ids: list[int]
    regions: list[tuple[int, int, int]]
    """Of each image, the characters that stand for it, and how many more they are than in the rendered text, those of
    the images before it among them."""


@dataclass
class Pictures:
    """Raises DataError for a processor that cannot be loaded, BadRow for a row that it cannot read."""

    folder: Path
    """Of the model."""
    tokenizer: Any
    dtype: str
    """Of what the model is given of pictures."""
    trusted: bool = False

    @cached_property
    def processor(self) -> Any:
        """Loaded when the first image comes."""
        from transformers import AutoProcessor

        try:
            made = AutoProcessor.from_pretrained(str(self.folder), trust_remote_code=self.trusted)
            if getattr(made, "image_processor", None) is None:
                raise ValueError("it has no preprocessor_config.json or processor_config.json of an image processor")
        except ImportError as error:
            raise DataError(f"{self.folder}: its processor needs what is not installed: {EXTRA}") from error
        except Exception as error:  # its files are data: whatever is wrong with them
            raise DataError(f"{self.folder}: its processor cannot be loaded: {first_line(error)}") from error
        own = deepcopy(self.tokenizer)
        if own.pad_token is None:  # what is padded is cut off again
            own.pad_token = own.eos_token or own.convert_ids_to_tokens(0)
        made.tokenizer = _Listening(own)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("processor", "standing")}

    @cached_property
    def marks(self) -> list[str]:
        """What a template may write in the place of an image, the likeliest first."""
        named = [name for name in vars(self.processor) if name.endswith("_token") and "video" not in name]
        first = [name for name in ("image_token", "boi_token") if hasattr(self.processor, name)]
        found = (getattr(self.processor, name) for name in dict.fromkeys([*first, *named]))
        known = self.tokenizer.get_vocab()
        return [mark for mark in dict.fromkeys(map(str, found)) if mark in known]

    @cached_property
    def standing(self) -> set[int]:
        """Ids of the tokens that stand for images."""
        return set(self.tokenizer.convert_tokens_to_ids(self.marks[:2]))

    def stands_for_image(self, ids: Sequence[int]) -> str | None:
        """The first token among `ids` that stands for an image; None: there is none."""
        return next((self.tokenizer.convert_ids_to_tokens(number) for number in ids if number in self.standing), None)

    def expand(self, text: str, images: Sequence[Any]) -> Expanded:
        """A rendered text with its images, PIL's."""
        mark = next((mark for mark in self.marks if mark in text), None)
        count = text.count(mark) if mark else 0
        if count < len(images):
            raise BadRow(f"the chat template has a place for {count} of its {len(images)} images")
        if count > len(images):
            raise BadRow(f"its text says {mark}, which stands for an image; leave that out")
        assert mark is not None
        whole, ids, _ = self._read([text], [images])
        expanded = Expanded(whole[0], ids[0], list(self._regions(text, mark, images, whole[0])))
        if rebuilt(expanded) != "".join(text.split(mark)):
            raise BadRow("the processor changes the text around its images, so its tokens cannot be told apart")
        return expanded

    def _regions(self, text: str, mark: str, images: Sequence[Any], whole: str) -> Iterator[tuple[int, int, int]]:
        at = start = 0
        for number in range(1, len(images) + 1):
            before, at = at, text.index(mark, at) + len(mark)
            start += at - len(mark) - before
            if number == len(images):
                end = len(whole) - (len(text) - at)
            else:
                end = len(self._read([text[:at]], [images[:number]])[0][0])
            yield start, end, end - at
            start = end

    def inputs(self, rows: Sequence[Mapping[str, Any]], width: int, *, left: bool = False) -> dict[str, torch.Tensor]:
        """What the model is given of the images of a batch of encoded rows, beside their tokens, which are padded to
        `width`; a row's tokens may be cut. Raises DataError if an image is not what it was."""
        seen = [number for number, row in enumerate(rows) if row.get("images")]
        if not seen:
            return {}
        try:
            images = [[open_image(kept)[0] for kept in rows[number]["images"]] for number in seen]
            _, ids, made = self._read([rows[number]["rendered"] for number in seen], images)
        except BadRow as error:
            raise DataError(str(error)) from None
        for number, own in zip(seen, ids, strict=True):
            if own[: len(rows[number]["input_ids"])] != list(rows[number]["input_ids"]):
                raise DataError(f"{', '.join(rows[number]['images'])}: is no more the image that was encoded")
        found: dict[str, torch.Tensor] = {}
        for name, value in made.items():
            if name in READ:
                continue
            if value.shape[:2] == made["input_ids"].shape:
                found[name] = _beside(value, made["attention_mask"], rows, seen, (width, left))
            else:
                found[name] = value.to(getattr(torch, self.dtype)) if value.is_floating_point() else value
        return found

    def _read(self, texts: list[str], images: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[int]], Any]:
        """Texts as they are tokenized, their ids, and all that the processor makes."""
        listening, many = self.processor.tokenizer, {"padding": True, "padding_side": "right"}
        try:
            made = self.processor(
                text=texts,
                images=[list(own) for own in images],
                add_special_tokens=False,
                return_tensors="pt",
                **(many if len(texts) > 1 else {}),
            )
        except Exception as error:  # a processor can be anything
            raise BadRow(f"the model's processor refuses its images: {first_line(error)}") from error
        pairs = zip(made["input_ids"], made["attention_mask"], strict=True)
        return listening.heard, [row[mask.bool()].tolist() for row, mask in pairs], made


def rebuilt(expanded: Expanded) -> str:
    """The text around the images."""
    starts, ends = [start for start, _, _ in expanded.regions], [end for _, end, _ in expanded.regions]
    edges = zip([0, *ends], [*starts, len(expanded.text)], strict=True)
    return "".join(expanded.text[start:end] for start, end in edges)


def _beside(
    value: torch.Tensor, mask: torch.Tensor, rows: Sequence[Mapping[str, Any]], seen: Sequence[int], place: Any
) -> torch.Tensor:
    """What is told of each token, of a batch; zeros for rows without images."""
    (width, left), made = place, list[torch.Tensor]()
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        own = torch.zeros(length, dtype=value.dtype)
        if number in seen:
            own = value[seen.index(number)][mask[seen.index(number)].bool()][:length]
        made.append(pad(own, (width - length, 0) if left else (0, width - length)))
    return torch.stack(made)


class _Listening:
    """A tokenizer that keeps the texts that it was given last."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.heard: list[str] = []

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.heard = [text] if isinstance(text, str) else list(text)
        return self.tokenizer(text, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)
