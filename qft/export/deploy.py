"""Whether an environment can load what an export would write, by the table of recipe/engines.py. Nothing is loaded."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import InvalidVersion, Version

from qft.documents.export import LoadCheck
from qft.errors import GateError, RecipeError
from qft.export.job import ExportOptions, find_job, load_run
from qft.export.targets import EXPORTERS, asked_targets
from qft.machine.device import find_device
from qft.progress import View
from qft.recipe.engines import ENGINES, PACKAGES, RULES
from qft.recipe.loads import Environment, judge, rules_of


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
    if readers := [one for one in asked if not one.here or any(rule.loads for rule in rules_of(one, weights))]:
        return [_check(target, weights, dtype, one) for one in readers]
    engines = sorted({rule.engine for rule in RULES if weights in rule.formats and rule.loads})
    reason = f"no engine that is installed here is known to load {weights}"
    remedies = [f"install one of {', '.join(engines)}"] if engines else []
    return [LoadCheck(target=target, format=weights, loads=False, reasons=[reason], remedies=remedies)]


def _check(target: str, weights: str, dtype: str, environment: Environment) -> LoadCheck:
    findings, rule = judge(weights, dtype, environment)
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


def _others(dtype: str, environment: Environment) -> list[str]:
    formats = dict.fromkeys(name for rule in RULES if rule.engine == environment.engine for name in rule.formats)
    others = [name for name in formats if not name.startswith("adapter")]  # its base is what it is
    return [name for name in others if not judge(name, dtype, environment)[0]]


def refuse_unloadable(checks: list[LoadCheck]) -> None:
    """Raise GateError with every target that no asked environment is known to load."""
    loaded = {check.target for check in checks if check.loads}
    if lines := [_refusal(check) for check in checks if check.target not in loaded]:
        raise GateError("\n".join(lines))


def _refusal(check: LoadCheck) -> str:
    verdict = "cannot be loaded" if check.loads is False else "it is not known whether it can be loaded"
    remedies = f". Remedy: {'; '.join(check.remedies)}" if check.remedies else ""
    return f"{check.target} ({check.format}): {verdict}: {'; '.join(check.reasons)}{remedies}"
