"""Compiling Triton kernels for GPUs that are not here."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Compiled(NamedTuple):
    """What the compiler made of one kernel for one target."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    loads_16: int
    stores_16: int


def _driver(capability):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Absent(DriverBase):
        """A driver for a GPU that is only compiled for."""

        @classmethod
        def is_active(cls):
            return True

        @staticmethod
        def map_python_to_cpp_type(ty):
            return "void*" if ty.startswith("*") else ty

        def __init__(self):
            pass

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability  # another device for each target, else the first target's kernel is found again

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):
            raise RuntimeError("nothing runs here")

    return Absent()


@contextlib.contextmanager
def target(capability):
    """Inside, ``kernel.warmup(...)`` compiles for sm_<capability>."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_driver(capability))
    try:
        yield
    finally:
        driver._active = before


def compile_for(capability, kernel, *arguments, grid=(1,), **constants):
    """Compile one launch for sm_<capability>; tensors (meta will not do, any CPU tensor will) stand for pointers.

    Returns:
        ``Compiled``, from the resources and the machine code that cuobjdump prints.
    """
    import triton

    with target(capability):
        made = kernel.warmup(*arguments, grid=grid, **constants)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    return Compiled(
        made.metadata.name,
        f"sm_{capability}",
        int(found[1]),
        int(found[2]),
        made.metadata.shared,
        len(re.findall(r"LDG\.E\.(?:\w+\.)*128", code)),
        len(re.findall(r"STG\.E\.(?:\w+\.)*128", code)),
    )
