"""Rules between fields of a calibration that need no knowledge of model, data or device."""

from collections.abc import Iterator

from qft.recipe.catalogue import CATALOGUE
from qft.recipe.loads import compressed, served, why_not
from qft.recipe.schema import AcceptSection, CalibrateSection, Recipe
from qft.recipe.section import Problem

COMPRESSED = "compressed-tensors"
SERVED_PRESETS = {
    "w4a16": "W4A16",
    "w8a16": "W8A16",
    "w8a8-dynamic": "W8A8 dynamic",
    "w8a8-static": "W8A8 static",
    "fp8": "FP8 dynamic",
}
"""Of calibrate.preset, by the names of the table in `engines`."""


def unread_by_calibration(calibrate: CalibrateSection) -> dict[str, str]:
    engine = CATALOGUE[calibrate.engine]
    unread = {
        f"calibrate.{name}": f"is read only with calibrate.engine {other}"
        for other, row in CATALOGUE.items()
        for name in row.reads_alone
        if other != calibrate.engine
    }
    if not engine.needs_windows(calibrate.activations) and calibrate.remedy != "distill":
        unread["calibrate.samples"] = f"{calibrate.engine} needs no calibration windows unless activations are static"
    if calibrate.data_type == "float":
        unread["calibrate.symmetric"] = "float8 has no zero point"
    unread |= {f"calibrate.{name}": reason for name, reason in engine.leaves_unread.items()}
    if calibrate.accept == AcceptSection():
        unread["calibrate.remedy"] = "has nothing to reach without calibrate.accept"
    if calibrate.remedy != "auto":
        unread["calibrate.max_bytes"] = "is read only with calibrate.remedy auto"
    if calibrate.remedy != "distill":
        fields = ("calibrate.distill_steps", "calibrate.distill_learning_rate")
        unread |= dict.fromkeys(fields, "is read only with calibrate.remedy distill")
    return unread


def calibrate_rules(calibrate: CalibrateSection, recipe: Recipe) -> Iterator[Problem]:
    engine = CATALOGUE[calibrate.engine]
    if engine.by_plugin and recipe.quant.mode != "custom":
        yield (
            "calibrate.engine",
            f"{calibrate.engine} quantizes by the code of quant.plugin, and quant.mode is {recipe.quant.mode}: set "
            "quant.mode to custom and quant.plugin to the file, or choose another engine",
        )
    yield from ((f"calibrate.{n}", text) for n, text in engine.needs.items() if getattr(calibrate, n) is None)
    if not engine.by_plugin:
        yield from _scheme_rules(calibrate)
    if problem := _serve_problem(calibrate):
        yield "calibrate.serve", problem
    if calibrate.remedy == "distill" and (why := _not_distilled(calibrate)):
        yield "calibrate.remedy", f"{why}; set it to {'none' if engine.whole_model else 'auto, or none'}"
    if engine.whole_model and calibrate.remedy == "auto":
        text = f"holds single layers in more bits, and {calibrate.engine} quantizes the whole model at once"
        yield "calibrate.remedy", f"{text}; set it to none"
    if calibrate.accept.score_drop is not None and not recipe.eval.metrics:
        yield "calibrate.accept.score_drop", "needs scores that can drop: set eval.metrics"


def _serve_problem(calibrate: CalibrateSection) -> str | None:
    """Why the engine of calibrate.serve does not load the result, and what it loads."""
    name, engine = calibrate.serve, CATALOGUE[calibrate.engine]
    if name is None:
        return None
    if served(name) is None:
        engines = ", ".join(f"{engine}-cpu, {engine}-cuda80" for engine in ("vllm", "sglang", "transformers"))
        return f"{name} is no engine with its device; give one as {engines}, llama.cpp or ollama"
    if engine.by_plugin:
        return f"{calibrate.engine} writes the format of quant.plugin, of which no engine is known; leave it out"
    why = why_not(name, compressed(calibrate) if engine.writes == COMPRESSED else _own_format(calibrate))
    if why is None:
        return None
    able = [preset for preset, scheme in SERVED_PRESETS.items() if not why_not(name, f"{COMPRESSED} {scheme}")]
    if able:
        return f"{why}: set calibrate.preset to {' or '.join(able)}"
    other = "use `qft export --to gguf-q4_k_m` instead" if why_not(name, "gguf") is None else "name another engine"
    return f"{why}; of all that is made here it loads nothing: {other}"


def _own_format(calibrate: CalibrateSection) -> str:
    return f"bnb-{calibrate.bits}bit" if calibrate.engine == "bitsandbytes" else calibrate.engine


def _not_distilled(calibrate: CalibrateSection) -> str | None:
    """Why quantized weights cannot learn; None if they can."""
    if CATALOGUE[calibrate.engine].whole_model:
        return f"{calibrate.engine} quantizes the whole model at once, and its scales are not known here"
    if calibrate.engine == "torchao" or (calibrate.engine == "bitsandbytes" and calibrate.data_type == "int"):
        return f"distill trains no 8-bit weights as {calibrate.engine} rounds them, which lose next to nothing"
    if calibrate.data_type not in ("int", "nf4"):
        return f"distill trains integers and nf4, and calibrate.data_type is {calibrate.data_type}"
    if not calibrate.symmetric:
        return "distill trains no weights with zero points (calibrate.symmetric: false)"
    if calibrate.activations == "static":
        return "distill trains with no scales for static activations (calibrate.activations)"
    return None


def _scheme_rules(calibrate: CalibrateSection) -> Iterator[Problem]:
    engine = CATALOGUE[calibrate.engine]
    field = "algorithm" if engine.algorithms else "engine"
    name = getattr(calibrate, field)
    kinds = engine.algorithms.get(calibrate.algorithm, engine.makes)
    if (calibrate.data_type, calibrate.bits, calibrate.activations) not in kinds:
        able = "; ".join(f"{kind} with {bits} bits and activations {acts}" for kind, bits, acts in sorted(kinds))
        yield f"calibrate.{field}", f"{name} makes {able}: change data_type, bits, activations or the {field}"
    by_row = calibrate.data_type == "float" or calibrate.activations != "none"
    if by_row and calibrate.group_size not in ("auto", -1):
        yield "calibrate.group_size", "8-bit products need one scale a row: set it to auto or -1"
    if calibrate.group_size == 16:
        yield (
            "calibrate.group_size",
            "16 is nvfp4's, for which quant.mode qat trains; integers are read by 32 or more",
        )
    if calibrate.activations != "none" and not calibrate.symmetric:
        yield "calibrate.symmetric", "8-bit products of activations need weights without a zero point: set it to true"
