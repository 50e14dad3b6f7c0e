"""What the checks on a machine with a GPU share. It goes with them to machines that have nothing else of this repository."""

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, Optional

EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE = 64, 69, 70


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fail(code: int, message: str) -> NoReturn:
    say(f"error: {message}")
    sys.exit(code)


def run(command: list, more: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs a command with further variables, and hands back what it printed."""
    words, environment = [str(part) for part in command], {**os.environ, **more}
    return subprocess.run(words, stdout=subprocess.PIPE, env=environment, check=False)


def printed(*command: object) -> Path:
    """The path that a script of this repository prints."""
    done = run(list(command), {})
    if done.returncode != 0:
        fail(done.returncode, f"{command[0]} failed; its message is above")
    return Path(done.stdout.decode().strip())


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """As the parser does, but a wrong flag ends with 64."""
    parser.error = lambda message: fail(EX_USAGE, f"{message}; see --help")
    return parser.parse_args()


def writable(path: Path) -> None:
    """Fails before anything is measured where the result could not be written."""
    try:
        with path.open("a"):
            pass
    except OSError as error:
        fail(EX_USAGE, f"cannot write {path}: {error.strerror}; give another --out")


def find_gpu(device: str) -> str:
    """The name of the GPU that `cuda:N` means, by asking the driver itself."""
    number = int(device.partition(":")[2] or 0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        fail(EX_UNAVAILABLE, "no NVIDIA driver here (libcuda.so.1); run this on a machine with a GPU, or --device cpu")
    name = ctypes.create_string_buffer(128)
    handle = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), number):
        fail(EX_UNAVAILABLE, f"the driver finds no GPU {number}")
    driver.cuDeviceGetName(name, len(name), handle)
    return name.value.decode()


def cuda_toolkit(python: Optional[Path]) -> dict[str, str]:
    """Variables by which a program finds NVRTC and CUDA's headers: this environment's own, or those beside PyTorch."""
    if os.environ.get("CUDA_PATH") or not python:
        return {}
    found = run([python, "-c", "import nvidia.cu13; print(nvidia.cu13.__path__[0])"], {})
    if found.returncode != 0:
        return {}
    folder = found.stdout.decode().strip()
    searched = [f"{folder}/lib", os.environ.get("LD_LIBRARY_PATH", "")]
    return {"CUDA_PATH": folder, "LD_LIBRARY_PATH": ":".join(filter(None, searched))}
