"""MIMDet inside Detectron2: the classes that the original's configs import, under the original's names.

Detectron2 is not a dependency of mimdet; without it, importing this package raises an error that says how to get it.
"""

from .require import require_detectron2

require_detectron2()

from ..engine.optim import get_fpn_model_parameters
from ..modeling import MIMDetDecoder, MIMDetEncoder
from .backbone import BenchmarkingViTDet, MIMDetBackbone
from .config import from_native, load_config, use_detectron2
from .dense import RetinaNetImageListForward
from .detector import NativeGeneralizedRCNN, NativeRetinaNet
from .fast_step import use_fast_step
from .model import GeneralizedRCNNImageListForward, _postprocess

__all__ = [
    "BenchmarkingViTDet",
    "GeneralizedRCNNImageListForward",
    "MIMDetBackbone",
    "MIMDetDecoder",
    "MIMDetEncoder",
    "NativeGeneralizedRCNN",
    "NativeRetinaNet",
    "RetinaNetImageListForward",
    "_postprocess",
    "from_native",
    "get_fpn_model_parameters",
    "load_config",
    "use_detectron2",
    "use_fast_step",
]
