"""Python configs in Detectron2's LazyConfig format, loaded without Detectron2."""

from .checks import check_config
from .lazy import LazyCall, instantiate
from .loader import find_config, load
from .overrides import apply_overrides
from .serialize import from_yaml, to_yaml
from .trusted import UntrustedConfigError, from_untrusted_yaml

__all__ = [
    "LazyCall",
    "UntrustedConfigError",
    "apply_overrides",
    "check_config",
    "find_config",
    "from_untrusted_yaml",
    "from_yaml",
    "instantiate",
    "load",
    "to_yaml",
]
