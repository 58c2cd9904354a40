"""What a recipe asks of memory."""

from typing import Literal

from qft.recipe.training import Section


class MemorySection(Section):
    """What a training does about memory."""

    on_oom: Literal["fit", "fail"] = "fit"
    """What happens when memory runs out in a step or an evaluation. fit: the step is made again from its beginning, in
    micro-batches of half the rows and twice as many of them (the same rows, the same effective batch), then with
    gradient checkpointing; an evaluation goes on with half the rows; every change is shown and stands in the report.
    fail: the run stops and says what helps."""
