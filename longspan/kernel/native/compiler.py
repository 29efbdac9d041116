"""The compiler: the native kernel's libraries, built from its source by whatever C++ compiler there is.

    python -m longspan.kernel.native.compiler

Run when Longspan is installed, and by that line at any time after. One library for each set of instructions; which of
them a processor has is found out when the kernel is used. Nothing of Longspan is imported here, since it is not
installed yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The folder of its source, of which one file includes the others; libraries lie beside it.
SOURCE = Path(__file__).with_name("cpp")
MAIN = "library.cpp"
# Instruction sets, the best first, and what turns them on.
SETS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),
}
OPTIONS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
ON_X86 = ("x86_64", "AMD64")


def library(name: str) -> Path:
    """Return where the library for an instruction set lies.

    Its name says what it was built from, so that one of another source, which may lay out its memory differently, is
    never taken for this one.
    """
    made_from = hashlib.sha256(" ".join(OPTIONS + SETS[name]).encode())
    for path in sorted(SOURCE.glob("*.[ch]pp")):
        made_from.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return SOURCE.with_name(f"native_{name}_{made_from.hexdigest()[:12]}.so")


def build() -> tuple[list[Path], str]:
    """Build what can be built beside the source and is not, and remove what was built from other sources.

    Return the libraries, and what went wrong or nothing.
    """
    compiler = next(
        (
            found
            for name in (os.environ.get("CXX"), "g++", "c++", "clang++")
            if name and (found := shutil.which(name))
        ),
        None,
    )
    if compiler is None:
        return [], "no C++ compiler was found: tried CXX, g++, c++ and clang++"
    names = [name for name, flags in SETS.items() if not flags or platform.machine() in ON_X86]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = dict(zip(names, pool.map(lambda name: _built(name, compiler), names), strict=True))
    made = [library(name) for name in names if not problems[name]]
    problem = next((problems[name] for name in reversed(names) if problems[name]), "")
    for other in set(SOURCE.parent.glob("native_*.so")) - set(made):
        other.unlink(missing_ok=True)
    return made, problem


def _built(name: str, compiler: str) -> str:
    """Build the library for an instruction set where it is not there, and return what went wrong or nothing."""
    if library(name).exists():
        return ""
    fresh = library(name).with_suffix(f".{os.getpid()}")
    ran = subprocess.run(
        [compiler, *OPTIONS, *SETS[name], str(SOURCE / MAIN), "-o", str(fresh)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        return f"{compiler} for {name}: {ran.stderr.strip()[-2000:]}"
    # Whole or not at all: another process may be loading the one before.
    fresh.replace(library(name))
    return ""


if __name__ == "__main__":
    libraries, trouble = build()
    print("\n".join([*map(str, libraries), *([trouble] if trouble else [])]))
    raise SystemExit(not libraries)
