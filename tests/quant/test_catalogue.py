"""The catalogue of engines says of each what is true of it, and every engine that a recipe may name is there."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from qft.calibration.whole import WHOLE_ENGINES
from qft.quant.engines import ENGINES, find_engine
from qft.quant.layer import LayerScheme
from qft.recipe.catalogue import CATALOGUE, SCHEME_FIELDS, export_problem
from qft.recipe.schema import CalibrateSection


def test_every_engine_of_the_schema_has_a_row_and_something_that_runs_it() -> None:
    assert get_args(CalibrateSection.model_fields["engine"].annotation) == tuple(CATALOGUE)
    by_block = {name for name, row in CATALOGUE.items() if not row.whole_model}
    assert by_block == ENGINES.keys()
    assert CATALOGUE.keys() - by_block == WHOLE_ENGINES.keys()


def test_rows_name_fields_of_the_section() -> None:
    fields = CalibrateSection.model_fields.keys()
    for row in CATALOGUE.values():
        assert {*row.reads_alone, *row.needs, *row.leaves_unread} <= fields
    assert set(SCHEME_FIELDS) <= fields
    assert {*CATALOGUE["llmcompressor"].algorithms} == {
        *get_args(CalibrateSection.model_fields["algorithm"].annotation)
    }


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_writes_the_format_of_its_row(name: str) -> None:
    row = CATALOGUE[name]
    for data_type, bits, activations in row.makes:
        scheme = LayerScheme(data_type, bits, activations=activations)
        config = find_engine(name).config({"a": scheme, "head": None}, torch.bfloat16)
        assert config["quant_method"] == row.writes


def test_windows_are_looked_at_as_the_row_says() -> None:
    needs = {name: [row.needs_windows(acts) for acts in ("none", "static")] for name, row in CATALOGUE.items()}
    assert needs["autoround"] == needs["llmcompressor"] == [True, True]
    assert needs["rtn"] == [False, True]
    assert needs["custom"] == [False, False]


def test_an_export_is_made_by_the_engines_that_write_its_format_block_by_block() -> None:
    problems = {name: export_problem(name, "compressed-tensors") for name in CATALOGUE}
    assert {name for name, problem in problems.items() if problem is None} == {"autoround", "rtn"}
    assert "writes its own format" in str(problems["torchao"])
    assert "whole models" in str(problems["llmcompressor"])
