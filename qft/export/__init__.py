"""`qft export`: a finished run, handed over in other forms, each proven to be the model that was trained."""

from qft.export.deploy.check import refuse_unloadable
from qft.export.export import EXPORTERS, ExportOptions, check_target, export

__all__ = ["EXPORTERS", "ExportOptions", "check_target", "export", "refuse_unloadable"]
