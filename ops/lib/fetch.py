"""What the scripts under ops/ share: the cache outside the repository, wheels fetched by name, version and hash, and the
build of our own programs.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Callable, NoReturn

EX_UNAVAILABLE = 69
# pip does not take one of these to mean the others.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")


def say(message: str) -> None:
    """Progress goes to stderr; stdout is for the path a script hands back."""
    print(message, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    say(f"error: {message}")
    sys.exit(EX_UNAVAILABLE)


def cache_root() -> Path:
    """`$SLUICE_CACHE`, else `sluice` in the user's cache directory."""
    chosen = os.environ.get("SLUICE_CACHE")
    if chosen:
        return Path(chosen).absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache).absolute() / "sluice"


def publish(target: Path, fill: Callable[[Path], None]) -> Path:
    """Returns `target`, made by `fill` in a scratch folder and renamed, so that it is whole or absent.

    Of two runs at the same time the second waits for the first, and finds its work done.
    """
    if target.is_dir():
        return target
    try:
        return _publish_alone(target, fill)
    except OSError as error:
        fail(f"cannot write {target}: {error}; free some space, or name another folder as SLUICE_CACHE")


def _publish_alone(target: Path, fill: Callable[[Path], None]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        # Left by a run that was killed; nobody else is at work here while we hold the lock.
        for abandoned in target.parent.glob(f".{target.name}.*"):
            if abandoned.is_dir():
                shutil.rmtree(abandoned)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            scratch.chmod(0o755)
            fill(scratch)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def python_environment(name: str, requirements: Path, *, whole_list: bool = False) -> Path:
    """The interpreter of a virtual environment in the cache with what `requirements` (a hash for each wheel) names.

    With `whole_list` the requirements are taken as they are, although what they say of each other may disagree.
    """
    pins = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = cache_root() / name / f"{sys.version_info.major}.{sys.version_info.minor}-{pins}"
    python, whole = folder / "bin/python", folder / "whole"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A virtual environment knows its own path, so it is made in place and marked when it is whole.
        if not whole.exists():
            say(f"{name}: installing {requirements.name}")
            venv.create(folder, clear=True, with_pip=True)
            install = [str(python), *"-m pip install -q --disable-pip-version-check".split()]
            install += ["--only-binary=:all:", "--require-hashes", *(["--no-deps"] if whole_list else [])]
            done = subprocess.run([*install, "-r", str(requirements)], stdout=sys.stderr, check=False)
            if done.returncode != 0:
                fail(f"pip could not install {requirements}; see its message above")
            whole.touch()
    return python


def require_python(version: tuple[int, int]) -> None:
    """Fails where another Python runs this script than the one whose wheels are locked."""
    if sys.version_info[:2] != version:
        fail(f"the wheels are locked for Python {version[0]}.{version[1]}; run this script with that one")


def build(root: Path, program: str) -> Path:
    """Builds the repository's programs as `ops/test` and `ops/demo` do, so that nothing is compiled twice; one's path."""
    command = ["cargo", "build", "--release", "--locked", "--quiet", "--workspace", "--bins"]
    if features := os.environ.get("SLUICE_FEATURES"):
        command += ["--features", features]
    if subprocess.run(command, cwd=root, stdout=sys.stderr).returncode != 0:
        fail("cargo could not build the programs; its message is above")
    return Path(os.environ.get("CARGO_TARGET_DIR") or root / "target") / "release" / program


def download_wheels(requirements: str, folder: Path) -> None:
    """Downloads the wheels that `requirements` (pip's format, with a hash for each) names into `folder`.

    The wheels are read here as archives and never installed, so the tags are fixed: every machine gets the same files,
    whatever its own Python.
    """
    listing = folder / "requirements.txt"
    listing.write_text(requirements)
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"),
        *("--no-deps", "--require-hashes", "--only-binary=:all:"),
        *(part for tag in PLATFORMS for part in ("--platform", tag)),
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none"),
        *("--dest", str(folder), "--requirement", str(listing)),
    ]
    result = subprocess.run(command, stdout=sys.stderr)
    listing.unlink()
    if result.returncode != 0:
        fail(
            f"pip could not download the wheels (its message is above; exit status {result.returncode}); check that"
            " this machine reaches its package index and that `ops/check-prerequisites` is silent, then run this again"
        )
