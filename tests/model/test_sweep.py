"""One model type of each kind through everything; all of them: `make sweep`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qft.checkpoint.layout import written_names
from tests.support.sweep import Swept, swept
from tests.support.tiny import tiny_model, write_tiny_model


def sound(kind: str, folder: Path) -> Swept:
    found = swept(kind, folder, made=True)
    said = (found.made, found.refused, found.unmerged, found.unforeseen, found.failed, found.differences)
    assert said == (None, None, None, None, None, [])
    return found


@pytest.mark.parametrize("kind", ["mamba"])
def test_one_of_each_kind_is_handed_over(kind: str, tmp_path: Path) -> None:
    sound(kind, tmp_path)


def test_a_checkpoint_for_images_is_trained_on_text_and_what_sees_is_handed_over_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_with_processor(folder: Path, kind: str) -> Path:
        write_tiny_model(folder, kind)
        for name in PROCESSOR:
            (folder / name).write_text(f'{{"of": "{name}"}}')
        return folder

    monkeypatch.setattr("tests.support.sweep.write_tiny_model", write_with_processor)
    sound("qwen3_vl", tmp_path)
    merged = tmp_path / "run" / "export" / "merged"
    for name in PROCESSOR:
        assert (merged / name).read_text() == (tmp_path / "base" / name).read_text()
    assert "AutoModelForImageTextToText" in (merged / "README.md").read_text()
    before, after = tensors(tmp_path / "base"), tensors(merged)
    visual = [name for name in before if ".visual." in name]
    assert len(visual) == 45
    assert all(torch.equal(before[name], after[name]) for name in visual)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(".language_model.layers." in name for name in changed)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert not [name for name in adapter if ".visual." in name]
    _, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values()), info


PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_of_tied_weights_those_are_written_that_the_files_had() -> None:
    model = tiny_model("camembert")
    first, other = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    assert {name for name in written_names(model, stored={first}) if name in (first, other)} == {first}
    assert {name for name in written_names(model, stored={other}) if name in (first, other)} == {other}
    assert {first, other} <= set(written_names(model, stored={first, other}))
    assert len({first, other} & set(written_names(model))) == 1
