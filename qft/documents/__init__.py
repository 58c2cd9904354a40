"""Every document that is written, as pydantic models with units."""

from qft.documents.abilities import Abilities
from qft.documents.calibration import CalibrationRecord, CalibrationReport
from qft.documents.evaluation import EvalDocument
from qft.documents.export import ExportDocument
from qft.documents.manifest import Manifest
from qft.documents.part import Part
from qft.documents.plan import CalibrationPlanDocument, PlanDocument
from qft.documents.registry import Event, VersionManifest
from qft.documents.state import CheckpointHashes, TrainingState
from qft.documents.training import Report

DOCUMENTS: dict[str, type[Part]] = {
    "report": Report,
    "eval": EvalDocument,
    "calibration": CalibrationReport,
    "export": ExportDocument,
    "plan": PlanDocument,
    "abilities": Abilities,
    "calibration-plan": CalibrationPlanDocument,
    "calibration-record": CalibrationRecord,
    "manifest": Manifest,
    "training-state": TrainingState,
    "checkpoint": CheckpointHashes,
    "registry": VersionManifest,
    "history": Event,
}
"""By the name that `qft schema` knows them by."""
