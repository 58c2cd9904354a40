"""A processor's files: its chat template is the model's where the tokenizer has none, and they go where it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qft.checkpoint.find import find_checkpoint, load_tokenizer
from qft.recipe.load import from_values
from tests.support.models import CHATML, byte_tokenizer, tiny_llama

FILES = {
    "preprocessor_config.json": {"image_processor_type": "SiglipImageProcessor"},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
}


@pytest.mark.parametrize("own", [None, "{{ messages[0]['content'] }}"])
@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_is_taken_where_the_tokenizer_has_none(
    file: str, own: str | None, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_llama().save_pretrained(base)
    byte_tokenizer(own).save_pretrained(base)
    for name, content in {**FILES, file: {"chat_template": CHATML}, "notes.json": {}}.items():
        (base / name).write_text(json.dumps(content))
    recipe = from_values({"model": {"path": str(base)}, "data": {"train": "-"}, "output_dir": "-"}).recipe
    checkpoint = find_checkpoint(recipe)
    tokenizer = load_tokenizer(checkpoint, recipe)
    assert tokenizer.chat_template == (own or CHATML)
    out.mkdir()
    checkpoint.save_reader(tokenizer, out)
    for name in (*FILES, file):
        assert (out / name).read_text() == (base / name).read_text()
    assert (out / "tokenizer.json").is_file()
    assert not (out / "notes.json").exists()
    assert not (out / "config.json").exists()
