"""Rasterization of polygons inside boxes, as pycocotools does it."""
