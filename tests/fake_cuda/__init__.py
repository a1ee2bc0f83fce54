"""PyTorch's CUDA path on a machine without a GPU, see ``fake_cuda.c``.

A process that is started with ``environment(build(folder))`` sees two CUDA devices. Everything
happens there as on GPUs, except that kernels compute nothing: what runs in which order, what is
copied and what the host waits for can be tested, numbers cannot.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

_OVERRIDES = torch.library.Library("aten", "IMPL")
HERE = Path(__file__).parent
# driver_types.h of the release that fake_cuda.c was written for; PyTorch's wheels bring it along.
INCLUDE = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"


def missing() -> str:
    """Why there can be no fake device here, or nothing."""
    if shutil.which("gcc") is None:
        return "no C compiler (gcc)"
    if not (INCLUDE / "driver_types.h").is_file():
        return "PyTorch is not built for CUDA 13"
    return ""


def build(folder: Path) -> Path:
    """Compile the library into ``folder``."""
    library = folder / "libfake_cuda.so"
    # PyTorch also opens libcuda.so.1 by name; a loaded library of that name is what it gets.
    options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{HERE}", f"-I{INCLUDE}"]
    source = str(HERE / "fake_cuda.c")
    subprocess.run(["gcc", *options, "-o", str(library), source], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """Variables of a process that is to use the library."""
    return {**os.environ, "LD_PRELOAD": str(library), "FAKE_CUDA": str(library)}


def make_usable() -> None:
    """In such a process, before it computes: go around what the library does not have."""
    torch.backends.cudnn.enabled = False
    # What no kernel wrote is false, but "all finite" and "all positive" is what code asks for.
    truth = [torch.ones((), dtype=torch.bool).to(f"cuda:{n}") for n in range(2)]
    _OVERRIDES.impl("all", lambda values: truth[values.device.index].clone(), "CUDA")
    _OVERRIDES.impl("repeat_interleave.Tensor", _repeat_on_host, "CUDA")


def _repeat_on_host(repeats: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
    """It reads the length of its result from the device, and loops for ever on what is there."""
    return torch.repeat_interleave(repeats.cpu()).to(repeats.device)


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[str, int, str]]]:
    """What the library tells meanwhile: (what, bytes or elements, innermost lines of Python)."""
    library = ctypes.CDLL(os.environ["FAKE_CUDA"])
    signature = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)
    told: list[tuple[str, int, str]] = []

    @signature
    def note(what: bytes, amount: int) -> None:
        stack = traceback.walk_stack(sys._getframe())
        lines = [f"{frame.f_code.co_filename}:{line}" for frame, line in stack][1:]
        own = [line for line in lines if "site-packages" not in line][:3]
        where = [Path(line).name for line in [*lines[:1], *own]]
        told.append((what.decode(), amount, " < ".join(dict.fromkeys(where))))

    library.fake_cuda_listen(note)
    try:
        yield told
    finally:
        library.fake_cuda_listen(signature())
