"""The backbone: ConvStem, sampled ViT encoder, MAE decoder."""

from .backbone import MIMDetBackbone
from .conv_stem import ConvStem
from .decoder import MIMDetDecoder
from .encoder import MIMDetEncoder
from .shapes import ImageList, ShapeSpec

__all__ = ["ConvStem", "ImageList", "MIMDetBackbone", "MIMDetDecoder", "MIMDetEncoder", "ShapeSpec"]
