"""Whether an environment can load what an export would write, judged by the table of `rules`. Nothing is loaded."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import InvalidVersion, Version

from qft.documents.export import LoadCheck
from qft.errors import GateError, RecipeError
from qft.export.deploy.rules import BFLOAT16, ENGINES, PACKAGES, RULES, Rule
from qft.export.job import ExportOptions, find_job, load_run
from qft.export.targets import EXPORTERS, asked_targets
from qft.machine.device import find_device
from qft.progress import View

Finding = tuple[bool | None, str, str]
"""False: cannot load; None: not known. Why, and what to do."""


@dataclass(frozen=True)
class Environment:
    """One engine on one device."""

    engine: str
    version: str | None = None
    device: str | None = None
    """cpu, or a compute capability as in 8.0. None: it was not said."""
    packages: Mapping[str, str | None] = field(default_factory=dict)
    here: bool = False
    """Whether it is this machine, so that what is not in `packages` is not installed."""


def check_target(folder: Path, options: ExportOptions, environment: str, view: View) -> list[LoadCheck]:
    """Whether `environment` can load what `export` would write of a run. Raises RecipeError for an environment that
    makes no sense, and what `export` raises before any work."""
    asked = environments(environment)
    loaded = load_run(folder, options.overrides)
    formats = {name: EXPORTERS[name].weight_format for name in asked_targets(loaded, options)}
    job = find_job(folder, loaded, options, view)
    return [check for name, of in formats.items() for check in check_loads(name, of(job), job.dtype, asked)]


def environments(text: str) -> list[Environment]:
    """What --check-target describes; `here` is one for each installed engine. Raises RecipeError."""
    if text != "here":
        return [_described(text)]
    found = find_device("auto")
    device = (found and found.capability) or "cpu"
    packages = {name: own for name in PACKAGES if (own := _installed(name))}
    engines = {name: package and _installed(package) for name, package in ENGINES.items()}
    return [Environment(name, own, device, packages, here=True) for name, own in engines.items() if own]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _described(text: str) -> Environment:
    given: dict[str, str | None] = {}
    problems = []
    for word in text.split(","):
        name, equals, value = word.strip().partition("=")
        problem = f"{name} is given twice" if name in given else _word_problem(name, value if equals else None)
        problems += [problem] if problem else []
        given[name] = value or None
    engines = [name for name in ENGINES if name in given]
    if len(engines) != 1:
        problems.append(f"names {' and '.join(engines) or 'no engine'}; give one of {', '.join(ENGINES)}")
    if {"cpu", "cuda"} <= given.keys():
        problems.append("names cpu and cuda; give one of them")
    if problems:
        raise RecipeError([f"--check-target {text}: {problem}" for problem in problems])
    packages = {name: given[name] for name in PACKAGES if name in given}
    device = given.get("cuda") or ("cpu" if "cpu" in given else None)
    return Environment(engines[0], given[engines[0]], device, packages)


def _word_problem(name: str, value: str | None) -> str | None:
    if name == "cpu":
        return None if value is None else "cpu takes no value"
    if name == "cuda":
        right = value is not None and re.fullmatch(r"\d+\.\d", value)
        return None if right else f"cuda={value or ''} is no compute capability; give cuda=MAJOR.MINOR, as in cuda=8.0"
    if name not in (*ENGINES, *PACKAGES):
        known = f"the engines {', '.join(ENGINES)}, the packages {', '.join(PACKAGES)}, cuda=MAJOR.MINOR and cpu"
        return f"{name or 'an empty word'} is not known; known are here alone, or {known}"
    try:
        Version(value if value is not None else "0")
    except InvalidVersion:
        return f"{name}={value} is no version; give one as in {name}=0.11.0"
    return None


def check_loads(target: str, weights: str, dtype: str, asked: list[Environment]) -> list[LoadCheck]:
    """What each environment makes of `target`; of this machine's engines those that could read the format at all."""
    if readers := [one for one in asked if not one.here or any(rule.loads for rule in _rules(one, weights))]:
        return [_check(target, weights, dtype, one) for one in readers]
    engines = sorted({rule.engine for rule in RULES if weights in rule.formats and rule.loads})
    reason = f"no engine that is installed here is known to load {weights}"
    remedies = [f"install one of {', '.join(engines)}"] if engines else []
    return [LoadCheck(target=target, format=weights, loads=False, reasons=[reason], remedies=remedies)]


def _rules(environment: Environment, weights: str) -> list[Rule]:
    return [rule for rule in RULES if rule.engine == environment.engine and weights in rule.formats]


def _check(target: str, weights: str, dtype: str, environment: Environment) -> LoadCheck:
    findings, rule = _judge(weights, dtype, environment)
    loads = False if any(finding[0] is False for finding in findings) else None if findings else True
    remedies = [remedy for _, _, remedy in findings if remedy]
    if loads is not True and (others := _others(dtype, environment)):
        remedies.append(f"or export what it loads: {', '.join(others)}")
    return LoadCheck(
        target=target,
        format=weights,
        engine=environment.engine,
        version=environment.version,
        device=environment.device,
        loads=loads,
        reasons=[reason for _, reason, _ in findings],
        remedies=remedies,
        source=rule.source if rule else None,
    )


def _judge(weights: str, dtype: str, environment: Environment) -> tuple[list[Finding], Rule | None]:
    """What stands in the way, nothing if it loads; and the rule that says so."""
    every, unknown = _rules(environment, weights), "no source is known that says whether"
    if not every:
        return [(None, f"{unknown} {environment.engine} loads {weights}", "")], None
    rules = [rule for rule in every if _tells_of(rule, environment.version)]
    if not rules:
        reason = f"{unknown} {environment.engine} {environment.version} loads {weights}"
        return [(None, reason, "another version")], None
    if unsaid := list(_unsaid(rules, environment)):
        return [*unsaid, *_package_obstacles(rules[-1], environment)], rules[-1]
    on_cpu = environment.device == "cpu"
    told = [rule for rule in rules if rule.anywhere or (rule.cpu if on_cpu else rule.cuda) is not None]
    if not told:
        place = "a CPU" if on_cpu else "a GPU"
        return [(None, f"{unknown} {environment.engine} loads {weights} on {place}", "")], None
    judged = [([*_obstacles(rule, weights, dtype, environment)], rule) for rule in told]
    # Of two rules the more lenient one decides: each tells of what loads, not of all that does.
    return min(judged, key=lambda one: 2 * any(f[0] is False for f in one[0]) + bool(one[0]))


def _unsaid(rules: list[Rule], environment: Environment) -> Iterator[Finding]:
    engine = environment.engine
    if environment.version is None and any(rule.since or rule.before for rule in rules):
        yield None, f"it depends on the version of {engine}", f"give {engine}=VERSION"
    if environment.device is None and not all(rule.anywhere for rule in rules):
        yield None, "it depends on the device", "give cuda=MAJOR.MINOR or cpu"


def _tells_of(rule: Rule, own: str | None) -> bool:
    if own is None:
        return True
    after = rule.since is None or Version(own) >= Version(rule.since)
    return after and (rule.before is None or Version(own) < Version(rule.before))


def _obstacles(rule: Rule, weights: str, dtype: str, environment: Environment) -> Iterator[Finding]:
    refusal = f"{rule.engine} does not load {weights}"
    if not rule.loads:
        yield False, refusal, ""
    elif environment.device == "cpu" and not rule.cpu:
        newer = f" of compute capability {rule.cuda} or newer" if rule.cuda else ""
        yield False, f"{refusal} on a CPU", f"a GPU{newer}"
    elif environment.device and environment.device != "cpu":
        yield from _gpu_obstacles(rule, weights, dtype, environment.device)
    yield from _package_obstacles(rule, environment)


def _package_obstacles(rule: Rule, environment: Environment) -> Iterator[Finding]:
    for name, lowest in rule.packages.items():
        own = environment.packages.get(name)
        needed = f"{rule.engine} needs {name} {lowest} or newer"
        if own is None and not environment.here:
            yield None, f"{needed}, and its version was not given", f"give {name}=VERSION"
        elif own is None or Version(own) < Version(lowest):
            yield False, f"{needed}, not {own or 'none'}", f"pip install '{name}>={lowest}'"


def _gpu_obstacles(rule: Rule, weights: str, dtype: str, device: str) -> Iterator[Finding]:
    own, lowest = Version(device), rule.cuda or "0.0"
    if own < Version(lowest):
        reason = f"{rule.engine} needs compute capability {lowest} for {weights}, not {device}"
        yield False, reason, f"a GPU of compute capability {lowest} or newer"
    if rule.below and own >= Version(rule.below):
        reason = f"{rule.engine} has no kernels for {weights} from compute capability {rule.below} on"
        yield False, reason, f"a GPU below {rule.below}"
    if dtype == "bfloat16" and weights != "gguf" and rule.engine in BFLOAT16 and own < Version("8.0"):
        cast = f"it is refused or cast to another type ({BFLOAT16[rule.engine]})"
        remedy = "a GPU of compute capability 8.0 or newer, or a run that computes in float16"
        yield False, f"bfloat16 needs compute capability 8.0, not {device}: {cast}", remedy


def _others(dtype: str, environment: Environment) -> list[str]:
    formats = dict.fromkeys(name for rule in RULES if rule.engine == environment.engine for name in rule.formats)
    others = [name for name in formats if not name.startswith("adapter")]  # its base is what it is
    return [name for name in others if not _judge(name, dtype, environment)[0]]


def refuse_unloadable(checks: list[LoadCheck]) -> None:
    """Raise GateError with every target that no asked environment is known to load."""
    loaded = {check.target for check in checks if check.loads}
    if lines := [_refusal(check) for check in checks if check.target not in loaded]:
        raise GateError("\n".join(lines))


def _refusal(check: LoadCheck) -> str:
    verdict = "cannot be loaded" if check.loads is False else "it is not known whether it can be loaded"
    remedies = f". Remedy: {'; '.join(check.remedies)}" if check.remedies else ""
    return f"{check.target} ({check.format}): {verdict}: {'; '.join(check.reasons)}{remedies}"
