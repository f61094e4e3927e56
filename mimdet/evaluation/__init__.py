"""COCO box and mask AP of a detector's results."""

from .coco_evaluator import COCOEvaluator
from .results import to_coco_results
from .table import copypaste_lines, format_results, per_class_table, results_table

__all__ = [
    "COCOEvaluator",
    "copypaste_lines",
    "format_results",
    "per_class_table",
    "results_table",
    "to_coco_results",
]
