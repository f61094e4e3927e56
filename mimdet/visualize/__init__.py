"""Images with drawn instances, image grids and training curves."""

from .curves import plot_training
from .draw import class_color, draw_instances, polygons_to_masks, save_png
from .grid import comparison_grid, image_grid

__all__ = [
    "class_color",
    "comparison_grid",
    "draw_instances",
    "image_grid",
    "plot_training",
    "polygons_to_masks",
    "save_png",
]
