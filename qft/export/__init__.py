"""`qft export`: a finished run, handed over in other forms, each proven to be the model that was trained."""

from qft.export.run import EXPORTERS, ExportOptions, export

__all__ = ["EXPORTERS", "ExportOptions", "export"]
