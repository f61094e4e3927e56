"""Training and evaluation of detectors."""

from .checkpoint import Checkpointer
from .evaluate import evaluate, evaluate_only
from .final_config import scale_to_batch_size
from .optim import get_default_optimizer_params, get_fpn_model_parameters
from .schedule import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    WarmupParamScheduler,
)
from .signals import TrainingInterrupted
from .step import NonFiniteLossError
from .trainer import train
from .weights import load_model_weights

__all__ = [
    "Checkpointer",
    "CosineParamScheduler",
    "MultiStepParamScheduler",
    "NonFiniteLossError",
    "TrainingInterrupted",
    "WarmupParamScheduler",
    "evaluate",
    "evaluate_only",
    "get_default_optimizer_params",
    "get_fpn_model_parameters",
    "load_model_weights",
    "scale_to_batch_size",
    "train",
]
