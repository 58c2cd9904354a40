"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model that is already loaded.

A task is a name that the harness knows, or the path of a task file. Its prompts, data and metrics are the harness's
own; no chat template is applied, and a context is as long as the model was built for. Not covered are tasks that run
code written by the model, and tasks about images or sounds.
"""

import copy
import difflib
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase, set_seed

from qft.data.batch import pad_token_id
from qft.documents.evaluation import HarnessResult
from qft.errors import MissingError, ModelError, RecipeError, first_line
from qft.files import require_regular
from qft.plan.packages import missing_packages
from qft.recipe import LoadedRecipe
from qft.recipe.load import is_task_file
from qft.recipe.schema import EvalSection

ANSWER_FIELDS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""By which a task says how long its answers may be; the first counts."""
ANSWER_TOKENS = 256
"""What the harness takes for a task that does not say."""
RESAMPLES = 1000
"""Bootstrap resamples behind the standard errors that have no formula; the harness seeds each itself."""


def asked_tasks(loaded: LoadedRecipe, more: Iterable[str] = ()) -> dict[str, str]:
    """Tasks of the recipe and `more` of the command line, each with how messages name it and the place asking for it.

    Paths among `more` are relative to the working directory."""
    asked = {task: loaded.problem("eval.harness", task) for task in loaded.recipe.eval.harness}
    for task in more:
        asked.setdefault(os.path.realpath(task) if is_task_file(task) else task, f"--harness: {task}")
    return asked


def check_tasks(asked: Mapping[str, str]) -> None:
    """See that there are such tasks; reads no data. Raises RecipeError, or MissingError for a file not there."""
    if problems := [f"{field}: {text}" for field, text in missing_packages(harness=asked)]:
        raise RecipeError(problems)
    for task, where in asked.items():
        if is_task_file(task) and not Path(task).is_file():
            raise MissingError(f"{where}: no such task file")
    if problems := list(_problems(asked)):
        raise RecipeError(problems)


def load_tasks(asked: Mapping[str, str], *, seed: int) -> dict[str, Any]:
    """Of what check_tasks let pass, the harness's tasks with their data. Raises RecipeError or MissingError for what
    cannot be set up."""
    disable_progress_bars()
    set_seed(seed)  # some tasks draw their examples as they are set up
    loaded = {task: _load(task, where) for task, where in asked.items()}
    names = Counter(name for found in loaded.values() for name in found["tasks"])
    if twice := [name for name, count in names.items() if count > 1]:
        raise RecipeError(f"eval.harness: {', '.join(twice)}: asked for more than once; leave one away")
    return loaded


def require_answer_room(tasks: Mapping[str, Any], room: int | None) -> None:
    """Raise RecipeError for a task whose answers alone may fill a table of `room` positions; None: there is none."""
    found = {name: task for loaded in tasks.values() for name, task in loaded["tasks"].items()}
    for name, task in found.items() if room else ():
        given = task.get_config("generation_kwargs") or {}
        longest = next((given[name] for name in ANSWER_FIELDS if name in given), ANSWER_TOKENS)
        if room and task.OUTPUT_TYPE == "generate_until" and longest >= room:
            text = f"writes up to {longest} tokens (max_gen_toks), and the model's table of positions ends at {room}"
            raise RecipeError(f"eval.harness: {name}: {text}")


def run_tasks(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], settings: EvalSection, *, seed: int, max_length: int | None
) -> list[HarnessResult]:
    """Ask the model what load_tasks gave, the first eval.harness_limit samples of each task. `max_length` is in tokens;
    None is what the harness finds for the model. Every task starts from `seed`, whichever others are asked with it."""
    import lm_eval

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the bootstrap would fork a process that may hold a GPU
    found: list[HarnessResult] = []
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
        lm = _wrapped(model, tokenizer, settings.batch_size, max_length)
        for name, loaded in tasks.items():
            set_seed(seed)
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed)
            try:
                options = {"limit": settings.harness_limit, "bootstrap_iters": RESAMPLES, "log_samples": False}
                document = lm_eval.evaluate(lm=lm, task_dict=loaded, **options)
            except (RuntimeError, MemoryError):  # torch's own; an allocator's failure among them
                raise
            except Exception as error:
                raise ModelError(f"eval.harness: {name}: failed on this model: {first_line(error)}") from error
            found += _results(document)
    return found


@cache
def _manager(known: bool) -> Any:
    """The harness's index of tasks. To read the thousands that are `known` takes seconds, and a file needs none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=known)


def _problems(asked: Mapping[str, str]) -> Iterator[str]:
    for task, where in asked.items():
        if is_task_file(task):
            try:
                _read(Path(task))
            except ValueError as error:
                yield f"{where}: {error}"
        elif task not in _manager(True).task_index:
            close = difflib.get_close_matches(task, _manager(True).all_tasks, n=1)
            hint = f", did you mean {close[0]}?" if close else "; the path of a task file ends in .yaml"
            yield f"{where}: lm-eval {version('lm_eval')} knows no such task{hint}"


class _TaskFile(yaml.SafeLoader):
    """A task file, the functions that it names left alone."""


_TaskFile.add_constructor("!function", lambda _, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    """What a task file holds. Raises ValueError if it is none."""
    try:
        held = yaml.load(require_regular(path).read_text("utf-8"), Loader=_TaskFile)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(held, dict) or not held.keys() & {"task", "group", "include"}:
        raise ValueError("is no task file of lm-eval, which names its task or group")
    return held


def _load(task: str, where: str) -> Any:
    """A task, or the tasks of a group or tag, as the harness's TaskDict."""
    from_file = is_task_file(task)
    manager = _manager(not from_file or "group" in _read(Path(task)))
    try:
        # Relative data_files are read from the working directory; here, from beside the task file.
        with chdir(Path(task).parent) if from_file else nullcontext(), redirect_stdout(io.StringIO()):
            loaded = manager.load([task])
    except OSError as error:
        raise MissingError(f"{where}: what it needs is not to be had: {first_line(error)}") from error
    except Exception as error:  # whatever a task's own code raises
        raise RecipeError(f"{where}: cannot be set up: {first_line(error)}") from error
    for name, part in loaded["tasks"].items():
        if getattr(part, "UNSAFE_CODE", False) or getattr(part, "MULTIMODAL", False):
            raise RecipeError(f"{where}: {name} runs code that the model wrote, or shows it more than text; remove it")
        if part.get_config("num_fewshot") is None:
            part.set_config(key="num_fewshot", value=0)
    return loaded


def _wrapped(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int | None) -> Any:
    """The model as the harness wants it. The tokenizer is a copy, for the harness gives it a token to pad with."""
    from lm_eval.models.huggingface import HFLM

    own = copy.deepcopy(tokenizer)
    own.pad_token_id = pad_token_id(tokenizer)
    # HFLM ties the weights anew, which a model whose adapter holds a head of its own does not stand.
    model.tie_weights = lambda: None
    try:
        return HFLM(
            pretrained=model,
            tokenizer=own,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",  # else log probabilities are rounded, and added up, in the model's 16 bits
        )
    finally:
        del model.tie_weights


def _results(document: Any) -> Iterator[HarnessResult]:
    """One entry a metric, from the harness's document, whose keys are `metric,filter` and `metric_stderr,filter`."""
    for task, figures in document["results"].items():
        given = document["versions"].get(task)
        for key, value in figures.items():
            metric, comma, used = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                yield HarnessResult(
                    task=task,
                    version=None if given in (None, "Yaml", "N/A") else str(given),
                    metric=metric,
                    filter=None if used == "none" else used,
                    value=_finite(value),
                    stderr=_finite(figures.get(f"{metric}_stderr,{used}")),
                    samples=figures["sample_len"],
                )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
