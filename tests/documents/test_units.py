"""The units of figures: they stand on the fields, and views and the JSON Schema read them there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qft.documents import calibration, evaluation, export, manifest, plan, registry, state, training
from qft.documents.part import Part, unit_of

WORDS = {"bytes": "bytes", "seconds": "seconds", "tokens": "tokens", "share": "share", "kl": "nats"}
"""What a word of a field's name says of its unit."""


def parts() -> list[type[Part]]:
    modules = (calibration, evaluation, export, manifest, plan, registry, state, training)
    own = [
        each
        for module in modules
        for each in vars(module).values()
        if getattr(each, "__module__", "") == module.__name__
    ]
    return [each for each in own if isinstance(each, type) and issubclass(each, Part)]


@pytest.mark.parametrize("part", parts(), ids=lambda part: part.__name__)
def test_a_figure_whose_name_tells_its_unit_has_it(part: type[Part]) -> None:
    for name, field in part.model_fields.items():
        says = {WORDS[word] for word in name.split("_") if word in WORDS}
        if says and not re.search("per_second|per_byte|interval|growing|added_tokens", name):
            assert unit_of(field) in says, name


def test_the_schema_tells_the_unit_also_of_what_is_optional_or_held_in_a_list() -> None:
    def units(schema: Any) -> set[str]:
        if isinstance(schema, list):
            return {unit for each in schema for unit in units(each)}
        if not isinstance(schema, dict):
            return set()
        own = {schema["unit"]} if isinstance(schema.get("unit"), str) else set()
        return own | {unit for each in schema.values() for unit in units(each)}

    told = training.Report.model_json_schema()
    assert told["properties"]["wall_seconds"]["unit"] == "seconds"
    assert units(told["properties"]["lengths"]) == {"tokens"}
    assert units(told["$defs"]["Memory"]["properties"]["history"]) == {"bytes"}
    assert units(evaluation.TargetResult.model_json_schema()["properties"]["kl_mean"]) == {"nats"}
    assert units(told["$defs"]["Loss"]["properties"]["spikes"]) == set()
    assert told["$defs"]["Loss"]["properties"]["spikes"]["description"]
