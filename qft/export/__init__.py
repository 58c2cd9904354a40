"""`qft export`: a finished run, handed over in other forms, each proven to be the model that was trained."""

from qft.export.artifacts import export
from qft.export.deploy import check_target, refuse_unloadable
from qft.export.job import ExportOptions
from qft.export.targets import EXPORTERS

__all__ = ["EXPORTERS", "ExportOptions", "check_target", "export", "refuse_unloadable"]
