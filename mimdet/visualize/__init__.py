"""Pictures with drawn instances, picture grids and training curves."""

from .curves import plot_training
from .draw import class_color, draw_instances, polygons_to_masks, save_png
from .grid import comparison_grid, picture_grid

__all__ = [
    "class_color",
    "comparison_grid",
    "draw_instances",
    "picture_grid",
    "plot_training",
    "polygons_to_masks",
    "save_png",
]
