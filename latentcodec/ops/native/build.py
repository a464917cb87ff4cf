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
from torch import Tensor

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
    "weight_gradient": "i p nnnn p pnn pnn nnnn n n p i",
}
"""The arguments of each function, by the letters of `TYPES`; what they are stands beside the functions."""

WORTH_A_THREAD = 1 << 15  # values, some 30 microseconds
PRODUCTS_A_VALUE = 32  # multiplications in the time of a value: 8 at a time, twice in a cycle

recording = threading.local()
"""Of each thread: `calls`, the list for the calls of native functions, or None (`recorder.py`)."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had; compiles them on a machine's first call."""
    compiler = _compiler()
    if compiler is None:
        log.warning("no C++ compiler was found: the VAE runs on torch's functions, slower but equal")
        return None
    try:
        return _declared(ctypes.CDLL(str(_built(compiler, _flags()))))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()  # some compilers fail without a word
        reason = (said or str(error)).splitlines()[0]
        log.warning("the native functions could not be built, so torch's run, slower but equal: %s", reason)
        return None


def library_if_built() -> ctypes.CDLL | None:
    """The compiled functions, or None as long as another thread compiles them: so that no first call waits for that."""
    if library.cache_info().currsize:  # asked for before: to look for a compiler takes milliseconds
        return library()
    if not _builders and (compiler := _compiler()) is not None and not _is_built(compiler):
        log.info("compiling the native functions; until they are there, torch's run, slower but equal")
        _builders.append(threading.Thread(target=library, name="latentcodec native build"))
        _builders[0].start()
    return None if _builders and _builders[0].is_alive() else library()


_builders: list[threading.Thread] = []
"""The thread that compiles, or did, in this process."""


def _is_built(compiler: list[str]) -> bool:
    try:
        return _file(compiler, _flags()).exists()
    except (OSError, subprocess.CalledProcessError):
        return True  # `library` says what is wrong


def _flags() -> list[str]:
    return [*FLAGS, *INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), [])]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, letters in SIGNATURES.items():
        function = getattr(library, f"latentcodec_{name}")
        function.argtypes = [TYPES[letter] for letter in letters.replace(" ", "")]
        function.restype = None
        setattr(library, name, _recorded(function))
    return library


def floats(*shape: int) -> Tensor:
    """Memory for float32 values on the CPU, whatever torch's default dtype and device are now."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def threads_for(work: float) -> int:
    """How many of torch's threads are worth waking for so much work, in values that are read, or as many as cost as
    much time: waking one takes longer than `WORTH_A_THREAD` of them."""
    return max(1, min(torch.get_num_threads(), int(work / WORTH_A_THREAD)))


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
        try:
            words = shlex.split(command)
        except ValueError:  # a quotation mark without its other half
            words = command.split()
        if words and shutil.which(words[0]):
            return words
    return None


def _file(compiler: list[str], flags: list[str]) -> Path:
    """Where the library lies once it is compiled."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    digest = hashlib.sha256(repr((compiler, version, flags)).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.read_bytes())
    return _cache_folder() / f"{digest.hexdigest()[:32]}.so"


def _built(compiler: list[str], flags: list[str]) -> Path:
    """The library's file, compiled unless an earlier process has done so."""
    library = _file(compiler, flags)
    if not library.exists():
        started = time.perf_counter()
        _compile([*compiler, *flags], sorted(SOURCES.glob("*.cpp")), library)
        log.info("compiled the native functions in %.1f s: %s", time.perf_counter() - started, library)
    return library


def _compile(command: list[str], sources: list[Path], library: Path) -> None:
    """Compile `sources` at once, a process each, and link them under another name before `library` appears."""
    if shutil.which("nice"):  # the first pass, on torch's functions, goes on meanwhile
        command = ["nice", "-n", "19", *command]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder, source.stem + ".o") for source in sources]
        running = [
            subprocess.Popen(
                [*command, "-c", str(source), "-o", str(made)],
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for source, made in zip(sources, objects, strict=True)
        ]
        said = [process.communicate()[1] for process in running]  # all, so that none is left behind
        for process, errors in zip(running, said, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
        linked = Path(folder, library.name)
        subprocess.run(
            [*command, *map(str, objects), "-o", str(linked)],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
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
