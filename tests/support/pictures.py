"""Tiny random models of images and text, each with a tiny processor of its family, and the rows that a script draws."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.models import byte_tokenizer
from tests.support.paths import ROOT

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 64}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
EXTRA = {
    "llava": ["<image>"],
    "gemma3": ["<boi>", "<eoi>", "<image_soft_token>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"],
    "qwen2_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "mistral3": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
}
"""Tokens of each family, from 261 on."""
MARKS = {"gemma3": "<boi>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
TORCHVISION = ("qwen2_vl", "mistral3")
"""Families whose processors need it."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def families() -> list[str]:
    """Those that can be made here."""
    has = importlib.util.find_spec("torchvision") is not None
    # With transformers 5.17, Idefics 3's own cannot be had without it either, and is a placeholder that says so.
    placeholder = "torchvision" in getattr(_by_pil("Idefics3ImageProcessor"), "_backends", ())
    without = (*TORCHVISION, "idefics3") if placeholder else TORCHVISION
    return [family for family in EXTRA if has or family not in without]


def write_seeing_model(folder: Path, family: str) -> Path:
    """Model, tokenizer and processor, in float32, of a seed."""
    torch.manual_seed(0)
    config = _CONFIGS[family]()
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for value in model.parameters():  # so that pictures come through, which nobody has trained
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=value[0].numel() ** -0.5)
    model.save_pretrained(folder)
    _processor(family).save_pretrained(folder)
    return folder


def _tokenizer(family: str) -> Any:
    tokenizer = byte_tokenizer(CHATML.replace("IMAGE", MARKS.get(family, EXTRA[family][0])))
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA[family]})
    if family == "gemma3":
        named = dict(zip(("boi_token", "eoi_token", "image_token"), EXTRA[family], strict=True))
        tokenizer._set_model_specific_special_tokens(named)
        tokenizer.init_kwargs |= named
    return tokenizer


def _by_pil(name: str) -> Any:
    """The image processor that needs no torchvision."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _processor(family: str) -> Any:
    tokenizer, square = _tokenizer(family), {"height": 28, "width": 28}
    made: dict[str, Callable[[], Any]] = {
        "llava": lambda: transformers.LlavaProcessor(
            _by_pil("CLIPImageProcessor")(size=square, crop_size=square),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        "gemma3": lambda: transformers.Gemma3Processor(
            _by_pil("Gemma3ImageProcessor")(size=square), tokenizer, image_seq_length=4
        ),
        "idefics3": lambda: transformers.Idefics3Processor(
            _by_pil("Idefics3ImageProcessor")(
                size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
            ),
            tokenizer,
            image_seq_len=1,
        ),
        "qwen2_vl": lambda: transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(min_pixels=784, max_pixels=3136, patch_size=14, merge_size=2),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(),
        ),
        "mistral3": lambda: transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}),
            tokenizer,
            patch_size=14,
            spatial_merge_size=1,
        ),
    }
    return made[family]()


def _llava() -> Any:
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER}
    text = {"model_type": "llama", **TEXT}
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=261, image_seq_length=4)


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 8},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        boi_token_index=261,
        eoi_token_index=262,
        image_token_index=263,
    )


def _idefics3() -> Any:
    text = {"model_type": "llama", **TEXT}
    return transformers.Idefics3Config(
        vision_config=TOWER, text_config=text, image_token_id=261, scale_factor=2, tie_word_embeddings=True
    )


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    named = {"image_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263, "video_token_id": 264}
    text = TEXT | {"rope_parameters": ROPE}
    return transformers.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **named)


def _mistral3() -> Any:
    text = {"model_type": "mistral", **TEXT}
    vision = {"model_type": "pixtral", "head_dim": 16, **TOWER, "image_size": 56}
    return transformers.Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=261, spatial_merge_size=1, tie_word_embeddings=True
    )


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "qwen2_vl": _qwen2_vl,
    "mistral3": _mistral3,
}


def draw_script() -> Any:
    """recipes/shapes/draw.py, as a module."""
    path = ROOT / "recipes/shapes/draw.py"
    spec = importlib.util.spec_from_file_location("draw_shapes", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("draw_shapes", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def picture(colour: str, shape: str = "circle", seed: int = 0) -> Any:
    """A PIL.Image of the script's."""
    return draw_script().draw(colour, shape, random.Random(seed))
