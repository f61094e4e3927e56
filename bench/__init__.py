"""Measurements of speed and memory, always beside their peers and their limit; imported as ``mimdet.bench``."""

if __name__ != "mimdet.bench":
    # From a checkout's root this folder would shadow any other package of that name.
    raise ImportError(
        "this folder is mimdet.bench; import it by that name, or run from outside the mimdet checkout "
        "to reach another package called 'bench'"
    )
