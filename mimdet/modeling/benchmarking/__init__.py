"""Benchmarking-ViT (Li et al., "Benchmarking Detection Transfer Learning with Vision Transformers", 2021)."""

from .backbone import BenchmarkingViTDet

__all__ = ["BenchmarkingViTDet"]
