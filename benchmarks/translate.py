"""How many configurations of other tools become recipes that pass `qft check` up to the model's download.

    python benchmarks/translate.py FOLDER [--verbose]

Reads every .yaml and .yml below FOLDER that Axolotl, LLaMA-Factory (stage sft), trl sft or torchtune's LoRA recipes
would train adapters by, translates it as `qft init --from --allow-unsupported` does, and asks `qft check`, without a
network and for a GPU of 24 GiB: what is refused for the want of a model has passed. Of each: whether every key has a
line, whether the recipe passes, and whether anything was left out as not supported.
"""

import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from qft.arrive import Translation, translate
from qft.arrive.written import write_translated
from qft.errors import MissingError, QftError, RecipeError
from qft.recipe import load, source


def main(folder: Path, verbose: bool) -> None:
    """Print the table."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    missing: Counter[str] = Counter()
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        for tool, found, why in measured(path):
            counts[tool].update(["all", *found])
            missing.update(why)
            if verbose and ("passes" not in found or why):
                print(f"{path.relative_to(folder)}: {', '.join(found)}: {'; '.join(why)[:300]}")
    print(f"{'tool':<16}{'adapters':>9}{'accounted':>11}{'passes':>8}{'both':>7}{'whole':>7}")
    for tool, count in counts.items():
        both = f"{count['both'] / count['all']:.0%}"
        print(f"{tool:<16}{count['all']:>9}{count['accounted']:>11}{count['passes']:>8}{both:>7}{count['whole']:>7}")
    if verbose:
        print(*(f"{count:5} {text}" for text, count in missing.most_common(40)), sep="\n")


def measured(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """The tool, what holds of its translation, and what was left out; nothing for another kind of file."""
    try:
        values = source.read(path).values
    except QftError:
        return
    if not trains_adapters(values):
        return
    try:
        made = translate(path)
    except RecipeError as error:
        yield "none", [], [str(error)]
        return
    found = ["accounted"] if accounted(made) else []
    problem = checked(made)
    found += ["passes"] if problem is None else []
    found += ["both"] if len(found) == 2 else []
    found += ["whole"] if len(found) == 3 and not made.unsupported else []
    left = [f"{line.key}: {line.text}" for line in made.unsupported]
    yield made.tool, found, [*([problem] if problem else []), *left]


def trains_adapters(values: Mapping[str, Any]) -> bool:
    """Whether it is a supervised training of adapters."""
    if "base_model" in values:
        judged = ("rl", "reward_model", "process_reward_model")
        return values.get("adapter") in ("lora", "qlora") and not any(values.get(name) for name in judged)
    if "model_name_or_path" in values:
        lora = values.get("finetuning_type") == "lora" and values.get("stage") == "sft" and values.get("do_train")
        others = ("stage", "beta", "max_prompt_length", "reward_funcs", "num_generations")  # judged answers, rewards
        return bool(lora or (values.get("use_peft") and not any(other in values for other in others)))
    model = values.get("model")
    name = str(model.get("_component_")) if isinstance(model, dict) else ""
    beside = ("teacher_model", "ref_checkpointer", "rlhf_loss")
    dpo = "dpo" in str(values.get("loss", "")).lower()
    return "lora_" in name and not dpo and not any(other in values for other in beside)


def accounted(made: Translation) -> bool:
    """Whether every key of the configuration has a line."""
    told = {line.key.partition(".")[0] for line in made.lines} | {line.key for line in made.lines}
    return all(key in told or key.partition(".")[0] in told for key in made.config.values)


def checked(made: Translation) -> str | None:
    """What `qft check` refuses the recipe for, beside a model that is not here; None if nothing."""
    from qft.commands.check import planned

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        try:
            write_translated(path, made, allow_unsupported=True)
            planned(load(path), gpu=24 * 2**30)
        except MissingError as error:
            return None if "model" in str(error) else f"missing: {error}"
        except QftError as error:
            return str(error)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--verbose" in sys.argv)
