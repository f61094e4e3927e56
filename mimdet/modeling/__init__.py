"""The backbone: ConvStem, sampled ViT encoder, MAE decoder."""

from .backbone import MIMDetBackbone
from .conv_stem import ConvStem
from .convnext_stem import ConvNeXtStem
from .decoder import MIMDetDecoder
from .encoder import MIMDetEncoder
from .pyramid import UpsampledTokens
from .shapes import ImageList, ShapeSpec

__all__ = [
    "ConvNeXtStem",
    "ConvStem",
    "ImageList",
    "MIMDetBackbone",
    "MIMDetDecoder",
    "MIMDetEncoder",
    "ShapeSpec",
    "UpsampledTokens",
]
