"""Which implementation is asked for: an argument, a ``with`` block, or the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

WORDS = ("auto", "triton", "cuda", "cpp", "eager")
ENVIRONMENT = "MIMDET_KERNELS"

_chosen: ContextVar[str | None] = ContextVar("mimdet_kernels", default=None)


class KernelUnavailableError(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


@contextmanager
def use(word: str) -> Iterator[None]:
    """Choose the implementation of every operation inside the block.

    The choice belongs to the current thread or task (a ``ContextVar``). Code compiled with ``torch.compile`` keeps
    what was chosen when it was traced: open the block around the first call.

    Raises:
        ValueError: not one of ``WORDS``.
    """
    token = _chosen.set(_checked(word, "mimdet.kernels.use"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested(impl: str | None = None, more: tuple[str, ...] = ()) -> str:
    """The word that holds here: the argument, else the innermost ``use``, else the environment, else "auto".

    Args:
        impl: the caller's argument.
        more: words of one operation alone, which only the argument may be.

    Raises:
        ValueError: an argument or MIMDET_KERNELS that is not one of ``WORDS``.
    """
    if impl is not None:
        return _checked(impl, "impl", WORDS + more)
    inside = _chosen.get()
    if inside is not None:
        return inside
    return _checked(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def _checked(word: str, source: str, words: tuple[str, ...] = WORDS) -> str:
    if word not in words:
        raise ValueError(f"{source}: {word!r} is not an implementation; choose from {', '.join(words)}")
    return word
