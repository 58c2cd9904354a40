"""What of a model can wait off the device, as memory.offload asks."""

from collections import Counter
from collections.abc import Iterator

from qft.checkpoint.skeleton import find_blocks
from qft.errors import ModelError
from qft.plan.model import ModelPlan
from qft.quant.hold import AsPacked
from qft.recipe.section import Problem


def offload_problems(plan: ModelPlan) -> Iterator[Problem]:
    """What of memory.offload the device or the model cannot do."""
    field, asked = "memory.offload", plan.recipe.memory.offload
    if asked == "none":
        return
    if asked == "cpu" and plan.device.kind == "cpu":
        yield field, "the model runs on the CPU, whose memory it is in anyway: set it to disk, or none"
    if plan.scheme.engine is None and plan.scheme.name != "none" and not isinstance(plan.scheme, AsPacked):
        text = f"how the checkpoint's {plan.scheme.name} holds its weights is known to its own code alone"
        yield field, f"{text}: set model.dequantize to true, or it to none"
    model = plan.skeleton
    try:
        name, _ = find_blocks(model, plan.shape.layers)
    except ModelError as error:
        yield field, f"{error}: set it to none"
        return
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    within = ((own, p) for own, p in model.named_parameters() if own.startswith(f"{name}."))
    if shared := next((own for own, parameter in within if owners[id(parameter)] > 1), None):
        yield field, f"{shared} is a weight of two modules, and blocks come and go one by one: set it to none"
