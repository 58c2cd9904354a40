"""vLLM, run by the Python of another environment on one model: what it makes of token ids, texts and prompts."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qft.errors import ModelError, RecipeError
from qft.files import write_json
from qft.machine import elsewhere
from qft.machine.elsewhere import Package, environment_of, run_script
from qft.recipe.engines import PACKAGES
from qft.recipe.loads import Environment

ASK = "import vllm; from vllm import LLM, SamplingParams; print('version', vllm.__version__)"
PACKAGE = Package("vllm", (0, 11), ASK)
DESCRIBE = f"""
import importlib.metadata as installed, json, torch, vllm
device = '.'.join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else 'cpu'
packages = {{}}
for name in {PACKAGES}:
    try: packages[name] = installed.version(name)
    except installed.PackageNotFoundError: pass
print('version', vllm.__version__)
print(json.dumps(dict(device=device, packages=packages)))
"""
"""Prints what the table of engines asks for too."""
SILENT_SECONDS = 3600
"""That it may say nothing: it loads a model meanwhile."""
CPU_CACHE_GIB = "1"
"""Of keys and values on a CPU, where it asks for it by a variable; the rows of a gate fit."""
SERVER_CACHE_GIB = "4"
"""Of a server, which would take nearly all memory."""
VARIABLES = {
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nothing is sent anywhere."""
OF_THE_JOB = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
"""One process, so that its failure is told where it is asked; and a row may be as long as the model was built for: what
it is asked to generate after that is never read."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM takes for --max-lora-rank."""


class Refused(ModelError):
    """vLLM runs, and does not load or run this model."""

    def __init__(self, reason: str, version: str) -> None:
        super().__init__(f"vLLM {version}: {reason}")
        self.version = version


@dataclass(frozen=True)
class Question:
    """What vLLM is asked about one model; the fields of vllm_job.py's file."""

    model: str
    """Folder of the weights."""
    tokenizer: str
    adapter: str | None
    rank: int
    """Of the adapter, at most."""
    dtype: str
    trust_remote_code: bool
    max_length: int
    """Tokens of the longest row, and what is to be generated after it."""
    seed: int
    rows: list[list[int]]
    """Token ids."""
    scored: list[list[int]]
    """Of each row the places whose tokens' log probabilities are asked for, from 1 on."""
    likeliest: int
    """Tokens whose log probabilities are told beside the taught one's."""
    texts: list[str]
    messages: list[dict[str, str]]
    """A conversation to be rendered by the chat template; empty: there is none."""
    prompts: list[list[int]]
    stops: list[int]
    """Ids that end a continuation, beside vLLM's own."""
    new_tokens: int


def rank_limit(rank: int) -> int:
    """The --max-lora-rank that takes an adapter of this rank. Raises ModelError above the largest."""
    found = next((limit for limit in RANKS if rank <= limit), None)
    if found is None:
        raise ModelError(f"vLLM takes adapters of rank {RANKS[-1]} at most, this one has {rank}; export --to merged")
    return found


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest rank of any layer, by an adapter_config.json."""
    ranks: list[int] = [config.get("r") or 1, *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def find_problem(python: str) -> str | None:
    """What keeps the Python at that path from running vLLM, and what to do; None if nothing does."""
    return elsewhere.find_problem(python, PACKAGE)


def environment_in(python: str, *, on_gpu: bool) -> Environment:
    """The vLLM of that Python, on this machine. Raises RecipeError with what keeps it from running there."""
    said: list[str] = []
    if problem := elsewhere.find_problem(python, replace(PACKAGE, ask=DESCRIBE), said.append):
        raise RecipeError(problem)
    told = json.loads(next(line for line in reversed(said) if line.startswith("{")))
    version = next(line for line in said if line.startswith("version ")).split()[1]
    return Environment("vllm", version, told["device"] if on_gpu else "cpu", told["packages"], here=True)


def variables(cache_gib: str, *, on_gpu: bool) -> dict[str, str]:
    """Of vLLM's processes; on a CPU so much is for keys and values, unless this process's say otherwise."""
    own = {} if on_gpu else {"VLLM_CPU_KVCACHE_SPACE": cache_gib}
    return own | environment_of(on_gpu=on_gpu) | VARIABLES


def ask(python: str, question: Question, folder: Path, *, on_gpu: bool) -> Mapping[str, Any]:
    """vLLM's answer, as vllm_job.py writes it; the job lies in `folder`. Raises Refused for a model that it does not
    load, ModelError for all else that fails."""
    folder = folder.resolve()  # where it runs
    report = folder / "vllm.json"
    write_json(folder / "vllm_job.json", asdict(question) | {"report": str(report)})
    command = [python, "-I", str(Path(__file__).with_name("vllm_job.py")), str(folder / "vllm_job.json")]
    environment = variables(CPU_CACHE_GIB, on_gpu=on_gpu) | OF_THE_JOB
    answer = run_script(command, report, who="vllm", silence=SILENT_SECONDS, environment=environment)
    if "error" in answer:
        raise Refused(answer["error"], answer["version"])
    return answer
