"""memory.offload: frozen blocks wait elsewhere, and nothing that is learnt is another thing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qft.commands.train import train
from qft.errors import QftError, RecipeError
from qft.export import export
from qft.memory.chunked_loss import chunk_loss
from qft.memory.offload import Offload
from qft.memory.offload_store import HostStore
from qft.model.load import load_base
from qft.model.offload import load_offloaded, look_up_on_host, offloading
from qft.plan import make_plan
from qft.plan.offload import offload_problems
from qft.progress import Step, View
from qft.recipe import load
from qft.views.terminal.plan import render_plan
from tests.support.architectures import MODELS, write_model
from tests.support.exports import options
from tests.support.families import tiny, write_tiny
from tests.support.growth import growth
from tests.support.models import tiny_llama
from tests.support.offloads import learnt, made, same
from tests.support.rows import chat, write_jsonl
from tests.support.runs import MODES, adapter, run

RecipeFile = Callable[..., Path]
DISK = {"offload": "disk"}
FIVE = {"num_hidden_layers": 5}
"""Blocks: the first and the last share a slot, and each slot is used again."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of that kind, of five blocks where that can be had."""

    def base(kind: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"offloaded-{kind}"
        if not folder.exists():
            write_model(folder, kind, **FIVE) if kind in MODELS else write_tiny(kind, folder)
        return folder

    return base


KINDS = ["llama", "gpt2", "gpt_neox", "phi", "mixtral", "opt", "falcon", "bloom", "gemma3", "qwen3_moe"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "one layer": {"target_modules": ["down_proj"], "lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "loftq": {"init_lora_weights": "loftq"},
    "biases": {"bias": "all"},
    "whole modules": {"modules_to_save": ["up_proj", "lm_head", "embed_tokens"], "target_modules": ["q_proj"]},
    "some blocks": {"layers_to_transform": [2], "target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "mode", "again"),
    [
        *((kind, "nf4", number % 2 == 1) for number, kind in enumerate(KINDS) if kind not in ("phi", "mixtral")),
        *(("llama", mode, number % 2 == 1) for number, mode in enumerate(MODES, 1)),
    ],
)
def test_gradients_are_those_of_the_resident_run(
    kind: str, mode: str, again: bool, bases: Callable[[str], Path], recipe_file: RecipeFile, tmp_path: Path
) -> None:
    """Whether what is between the blocks is kept or computed `again`."""
    sections: dict[str, Any] = {name: section and dict(section) for name, section in MODES[mode].items()}
    sections["model"] = {"path": str(bases(kind))} | sections.get("model", {})
    if sections["quant"]:
        sections["quant"]["allow_partial"] = True

    def found(memory: dict[str, Any] | None, again: bool) -> dict[str, Any]:
        path = recipe_file(memory=memory, train={"gradient_checkpointing": again}, **sections)
        return learnt(make_plan(load(path)), tmp_path)

    assert same(found(None, False), found(DISK, again))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *[("one layer", "nf4"), ("dora", "nf4"), ("dora", "bf16"), ("loftq", "nf4"), ("biases", "bf16")],
        *[("whole modules", "nf4"), ("whole modules", "bf16"), ("some blocks", "nf4")],
    ],
)
def test_every_adapter_starts_and_learns_as_on_a_resident_base(
    name: str, mode: str, bases: Callable[[str], Path], recipe_file: RecipeFile, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"model": {"path": str(bases("llama")), **MODES[mode].get("model", {})}}
    quant = MODES[mode]["quant"] and {"skip_modules": ADAPTERS[name].get("modules_to_save", []), "allow_partial": True}
    results = []
    for memory in (None, DISK):
        plan = make_plan(load(recipe_file(memory=memory, quant=quant, adapter=ADAPTERS[name], **sections)))
        torch.manual_seed(7)
        results.append(learnt(plan, tmp_path))
    assert same(*results)


def test_a_checkpoint_that_comes_quantized(
    bases: Callable[[str], Path], recipe_file: RecipeFile, tmp_path: Path
) -> None:
    plan = make_plan(load(recipe_file(model={"path": str(bases("llama"))})))
    folder = tmp_path / "quantized"
    load_base(plan.model).save_pretrained(folder)
    plan.model.tokenizer.save_pretrained(folder)
    path = {"model": {"path": str(folder)}, "quant": None}
    assert same(*(learnt(make_plan(load(recipe_file(memory=memory, **path))), tmp_path) for memory in (None, DISK)))


def test_the_hosts_memory_keeps_what_files_keep(recipe_file: RecipeFile) -> None:
    plan, offload = make_plan(load(recipe_file())).model, Offload(HostStore(pinned=False), torch.device("cpu"))
    model, ids = load_offloaded(plan, offload), torch.arange(3, 20).view(1, 17)
    assert offload.bytes_elsewhere == 0  # of two blocks, and both have a slot
    torch.testing.assert_close(model(input_ids=ids).logits, load_base(plan)(input_ids=ids).logits, rtol=0, atol=0)


class Cut(View):
    """Ends the process, as it were, a step behind a checkpoint."""

    def step(self, step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt


def test_a_run_is_the_resident_one_from_its_first_evaluation_to_its_export(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    """Evaluated before, within and after, with answers, resumed from a checkpoint, and merged."""

    held_out = write_jsonl(tmp_path / "held_out.jsonl", [chat(f"say {i}", f"it was {i}") for i in range(4)])

    def path(name: str, memory: dict[str, Any] | None) -> Path:
        return recipe_file(
            f"{name}.yaml",
            memory=memory,
            data={"eval": str(held_out)},
            adapter={"lora_dropout": 0.2},
            train={
                "max_steps": 4,
                "gradient_accumulation_steps": 1,
                "save_strategy": "steps",
                "save_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
            },
            eval={"metrics": ["exact_match"], "max_new_tokens": 4, "samples": 2},
            output_dir=str(tmp_path / name),
        )

    resident = run(path("resident", None))
    aside = tmp_path / "aside"
    recipe = path("offloaded", DISK | {"offload_folder": str(aside)})
    with pytest.raises(KeyboardInterrupt):
        train(load(recipe), Cut())
    assert [*aside.iterdir()] == []
    offloaded = run(recipe, resume=True)
    assert [*aside.iterdir()] == []
    assert (offloaded.loss, offloaded.eval.after) == (resident.loss, resident.eval.after)
    assert offloaded.model.bits_per_weight == pytest.approx(resident.model.bits_per_weight, rel=0.06)
    assert offloaded.memory.components.base_weights < resident.memory.components.base_weights
    for name, tensor in adapter(tmp_path / "resident").items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "offloaded")[name], rtol=0, atol=0)
    [document] = export(tmp_path / "offloaded", options("merged"), View())
    assert document.passed


def test_the_files_are_in_the_run_and_say_what_they_are(recipe_file: RecipeFile, tmp_path: Path) -> None:
    plan = make_plan(load(recipe_file(memory=DISK)))
    with offloading(plan.model, tmp_path) as offload:
        assert offload is not None
        load_offloaded(plan.model, offload)
        [folder] = tmp_path.glob(".offload.qft-*")
        names = sorted(path.name for path in folder.iterdir())
        with safe_open(folder / names[0], framework="pt") as file:
            assert file.metadata()["kind"] == "offload"
            assert file.get_tensor("self_attn.q_proj.weight").dtype == torch.uint8
    assert names == ["block-00000.safetensors", "block-00001.safetensors"]
    assert [*tmp_path.glob(".offload*")] == []


def test_the_plan_says_where_the_base_waits(recipe_file: RecipeFile) -> None:
    shown = {}
    for offload in ("none", "disk"):
        console = Console(width=120, record=True, file=StringIO())
        console.print(render_plan(make_plan(load(recipe_file(memory={"offload": offload}))).document()))
        shown[offload] = console.export_text()
    assert "its blocks wait on disk, and two at a time are on the device" in shown["disk"]
    assert "wait" not in shown["none"]


def test_weights_that_are_not_there_are_not_used(recipe_file: RecipeFile, tmp_path: Path) -> None:
    with made(make_plan(load(recipe_file(memory=DISK))), tmp_path) as model:
        ids = torch.arange(3, 12).view(1, 9)
        assert model(input_ids=ids, labels=ids).loss > 0
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        with pytest.raises(AssertionError, match="not there"):
            layer(torch.zeros(1, 1, 64))


def test_a_file_that_goes_is_told(recipe_file: RecipeFile, tmp_path: Path) -> None:
    with made(make_plan(load(recipe_file(memory=DISK))), tmp_path) as model:
        for path in tmp_path.glob(".offload*/block-00001*"):
            path.unlink()
        with pytest.raises((QftError, OSError), match="block-00001"):
            model(input_ids=torch.arange(3, 12).view(1, 9))


def test_rows_of_the_table_are_looked_up_on_the_host() -> None:
    """Of scaled embeddings too, and of a table with a padding row."""
    model = tiny("gemma3")
    model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.tensor([[3, 0, 263, 3]])
    before = model.requires_grad_(False)(input_ids=ids).logits
    assert look_up_on_host(model, torch.device("cpu")) == 264 * 64 * 4
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert look_up_on_host(tiny("gemma3").requires_grad_(False), torch.device("cpu")) == 0  # the head needs it


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opt"])
def test_the_loss_in_parts_is_the_loss(kind: str, bases: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases(kind), dtype=torch.float32).eval()
    ids = torch.randint(3, 260, (3, 37), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :9], labels[2, 30:], mask[2, 30:] = -100, -100, 0

    def found(count: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = [found(count) for count in (None, 50)]
    assert chunk_loss(model, rows=20)
    shapes: list[Any] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(out.shape[:2].numel()))
    for (loss, gradients), count in zip(whole, (None, 50), strict=True):
        again, others = found(count)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    assert max(shapes) <= 20


def test_a_loss_of_another_kind_stays_whole() -> None:
    """A model that weighs its tokens by where they stand."""
    model = tiny_llama()
    model.loss_function = lambda logits, labels, **_: (
        logits.softmax(-1).mul(torch.arange(logits.shape[1])[:, None]).sum()
    )
    assert not chunk_loss(model, rows=20)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("sections", "field", "text"),
    [
        ({"memory": {"offload": "cpu"}}, "memory.offload", "set it to disk"),
        ({"memory": {"offload_folder": "x"}}, "memory.offload_folder", "only with memory.offload disk"),
        (
            {"memory": DISK, "quant": None, "adapter": {"kind": "none", "r": ...}},
            "memory.offload",
            "adapter.kind to lora",
        ),
        (
            {"memory": DISK, "quant": {"preset": ..., "mode": "custom", "plugin": "x.py"}},
            "memory.offload",
            "quant.plugin",
        ),
        (
            {"memory": DISK, "quant": None, "adapter": {"init_lora_weights": "olora"}},
            "adapter.init_lora_weights",
            "olora",
        ),
        ({"memory": DISK, "quant": None, "train": {"torch_compile": True}}, "train.torch_compile", "set it to false"),
    ],
)
def test_what_cannot_wait_elsewhere_is_refused(
    sections: dict[str, Any], field: str, text: str, recipe_file: RecipeFile
) -> None:
    with pytest.raises(RecipeError, match=rf"recipe.yaml:\d+: {field}: .*{text}"):
        make_plan(load(recipe_file(**sections)))


def test_a_model_whose_blocks_share_weights_is_refused(recipe_file: RecipeFile) -> None:
    plan = make_plan(load(recipe_file(memory=DISK))).model
    layers = plan.skeleton.model.layers
    layers[1].mlp = layers[0].mlp
    [(field, text)] = offload_problems(plan)
    assert field == "memory.offload"
    assert "layers.0.mlp" in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_on_disk_is_never_in_memory_whole(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """Its memory of its own, not what the system keeps of files: 8 blocks of 6 MB each in bfloat16."""
    base = write_model(tmp_path / "base", "llama", num_hidden_layers=8, hidden_size=512, intermediate_size=2048)
    recipes = []
    for name, memory in ("resident", None), ("disk", DISK):
        path = recipe_file(
            memory=memory,
            model={"path": str(base), "dtype": "bfloat16"},
            quant=None,
            adapter={"target_modules": ["q_proj"]},
            train={"max_steps": 1, "report_to": [], "gradient_checkpointing": True, "gradient_accumulation_steps": 1},
            output_dir=str(tmp_path / name),
        )
        recipes.append(path.rename(path.with_name(f"{name}.yaml")))
    resident, disk = growth(*recipes)
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert weights > 100e6  # in float32
    assert disk < resident - weights / 4  # half of them, in bfloat16
