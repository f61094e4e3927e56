"""The backbones: MIMDet's ConvStem, sampled ViT encoder and MAE decoder; and Benchmarking-ViT."""

from .backbone import MIMDetBackbone
from .benchmarking import BenchmarkingViTDet
from .conv_stem import ConvStem
from .convnext_stem import ConvNeXtStem
from .decoder import MIMDetDecoder
from .encoder import MIMDetEncoder
from .pyramid import UpsampledTokens
from .shapes import ImageList, ShapeSpec

__all__ = [
    "BenchmarkingViTDet",
    "ConvNeXtStem",
    "ConvStem",
    "ImageList",
    "MIMDetBackbone",
    "MIMDetDecoder",
    "MIMDetEncoder",
    "ShapeSpec",
    "UpsampledTokens",
]
