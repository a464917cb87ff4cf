"""The C++ sources beside this file as one library: compiled at the first call on a machine, kept in the user's cache.

The file in the cache is named after the sources, the compiler's version and the instruction sets that torch uses here
(`ATEN_CPU_CAPABILITY` holds for both), so that machines of different kinds can share a home. It is written under a name
of its own and then renamed: any number of processes may build at once. Without a compiler there is no library, which is
said once; callers then use torch.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")  # unless the environment names one as CXX
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
INSTRUCTION_SETS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
"""By torch's name for what this machine has; others get what every machine of their kind has."""
TYPES = {"i": ctypes.c_int, "n": ctypes.c_int64, "p": ctypes.c_void_p, "d": ctypes.c_double}
SIGNATURES = {
    "window": "ip pn pnn pn nnnn pp ii",
    "halving_window": "n p pnn pn nnn i",
    "normalise": "ipp nnn pp ii",
    "add_moments": "iipp pnn nnnn i",
    "norm": "pppp pppp nnnn d",
    "gradient_sums": "ippp nnn ppp i",
    "gradient": "ippp nnn p i",
    "convolve": "p pnn nnnn nnn nnn p p pnn np i",
    "winograd_convolve": "ii p pnn nnnn nnn p p pnn nn p i",
    "checksum": "npp",
    "winograd_weight": "ii pp nn nnnn i",
}
"""The arguments of each function, by the letters of `TYPES`; what they are stands beside the functions."""

recording = threading.local()
"""Of each thread: `calls`, the list for the calls of native functions, or None (`recorder.py`)."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    compiler = _compiler()
    if compiler is None:
        log.warning("no C++ compiler was found: the VAE runs on torch's functions, slower but equal")
        return None
    flags = [*FLAGS, *INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), [])]
    try:
        return _declared(ctypes.CDLL(str(_built(compiler, flags))))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        log.warning("the native functions could not be built, so torch's run, slower but equal: %s", reason)
        return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, letters in SIGNATURES.items():
        function = getattr(library, f"latentcodec_{name}")
        function.argtypes = [TYPES[letter] for letter in letters.replace(" ", "")]
        function.restype = None
        setattr(library, name, _recorded(function))
    return library


def _recorded(function: Any) -> Callable[..., None]:
    """`function`, whose calls are written down where a recorder wants it."""
    types = function.argtypes

    def call(*given: Any) -> None:
        function(*given)
        if (calls := getattr(recording, "calls", None)) is not None:
            calls.append((function, tuple(kind(value) for kind, value in zip(types, given, strict=True))))

    return call


def _compiler() -> list[str] | None:
    """The command that compiles C++, as the environment's CXX or as found in the path."""
    for command in [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _built(compiler: list[str], flags: list[str]) -> Path:
    """The library's file, compiled unless an earlier process has done so."""
    sources = sorted(SOURCES.glob("*.cpp"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((compiler, version, flags)).encode())
    for path in sorted([*sources, *SOURCES.glob("*.h")]):
        digest.update(path.read_bytes())
    library = _cache_folder() / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        started = time.perf_counter()
        _compile([*compiler, *flags], sources, library)
        log.info("compiled the native functions in %.1f s: %s", time.perf_counter() - started, library)
    return library


def _compile(command: list[str], sources: list[Path], library: Path) -> None:
    """Compile `sources` at once, a process each, and link them under another name before `library` appears."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder, source.stem + ".o") for source in sources]
        running = [
            subprocess.Popen(
                [*command, "-c", str(source), "-o", str(made)], stderr=subprocess.PIPE, text=True
            )
            for source, made in zip(sources, objects, strict=True)
        ]
        for process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
        linked = Path(folder, library.name)
        subprocess.run(
            [*command, *map(str, objects), "-o", str(linked)], check=True, capture_output=True, text=True
        )
        linked.replace(library)


@cache
def _cache_folder() -> Path:
    """A folder of the user's own that outlives the process; where none can be written, one that goes with it."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home, "latentcodec", "native")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the latter where the user has no home
        passing = tempfile.mkdtemp(prefix="latentcodec-")
        atexit.register(shutil.rmtree, passing, ignore_errors=True)
        return Path(passing)
