"""Fused operations of the backbone, imported as ``mimdet.kernels``."""

if __name__ != "mimdet.kernels":
    # From a checkout's root this folder would shadow the package of that name on PyPI.
    raise ImportError(
        "this folder is mimdet.kernels; import it by that name, or run from outside the mimdet checkout "
        "to reach another package called 'kernels'"
    )
