"""Whether an engine loads a format, judged by the table of `engines`; for `calibrate.serve`, by its newest release."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from qft.recipe.engines import BFLOAT16, ENGINES, PACKAGES, RULES, Rule

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


def rules_of(environment: Environment, weights: str) -> list[Rule]:
    return [rule for rule in RULES if rule.engine == environment.engine and weights in rule.formats]


def judge(weights: str, dtype: str, environment: Environment) -> tuple[list[Finding], Rule | None]:
    """What stands in the way, nothing if it loads; and the rule that says so."""
    every, unknown = rules_of(environment, weights), "no source is known that says whether"
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
        said = f", which says: {rule.says}" if rule.says else ""
        yield False, f"{refusal} on a CPU{said}", f"a GPU{newer}"
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


def served(name: str) -> Environment | None:
    """The environment that calibrate.serve names: an engine's newest release in the table, with all that it needs; None
    if it names none."""
    found = re.fullmatch(r"(.+?)(?:-(cpu|cuda(\d+)(\d)))?", name)
    if not found or found[1] not in ENGINES:
        return None
    rules = [rule for rule in RULES if rule.engine == found[1]]
    if not found[2] and not all(rule.anywhere for rule in rules):
        return None
    newest = max((rule.since for rule in rules if rule.since), key=Version, default=None)
    device = f"{found[3]}.{found[4]}" if found[3] else found[2]
    return Environment(found[1], newest, device, dict.fromkeys(PACKAGES, "9999"))


def compressed(scheme: Any) -> str:
    """The name in the table of compressed-tensors whose layers are held so: by the fields of `calibrate`."""
    kind = f"W{scheme.bits}A16{'' if scheme.symmetric else ' with zero points'}"
    if scheme.data_type == "float":
        kind = "NVFP4A16" if scheme.group_size == 16 else "MXFP4A16"
    if scheme.activations != "none":
        kind = f"{'FP8' if scheme.data_type == 'float' else f'W{scheme.bits}A8'} {scheme.activations}"
    return f"compressed-tensors {kind}"


def why_not(name: str | None, weights: str) -> str | None:
    """Why what calibrate.serve names does not load weights of this format, or nobody knows that it does."""
    environment = served(name) if name else None
    findings, rule = judge(weights, "", environment) if environment else ([], None)
    if not findings:
        return None
    source = f" ({rule.source})" if rule else ""
    return f"{'; '.join(reason for _, reason, _ in findings)}{source}"
