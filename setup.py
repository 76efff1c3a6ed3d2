"""Build the two C parts next to their sources: a static sandbox binary and the decode engine.

Both are plain `gcc` calls (the sandbox binary is not a Python extension), hooked into build_py so
that `pip install .` and `pip install -e .` leave them where the package looks for them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
NATIVE = ROOT / "dsec/native"
EMBEDDED = ROOT / "rollout/engines/embedded"
PARTS = (
    (NATIVE / "dsec-sandbox", sorted(NATIVE.glob("*.c")), sorted(NATIVE.glob("*.h")), ["-O2", "-static"]),
    (
        EMBEDDED / "v4.so",
        sorted(EMBEDDED.glob("*.c")),
        sorted(EMBEDDED.glob("*.h")),
        ["-O3", "-march=x86-64-v3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread"],
    ),
)


def compile_parts() -> None:
    """Compile each part whose sources are newer than its output."""
    for target, sources, headers, flags in PARTS:
        inputs = [*sources, *headers, ROOT / "setup.py"]
        if not sources or (target.exists() and target.stat().st_mtime >= max(p.stat().st_mtime for p in inputs)):
            continue
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        command = [os.environ.get("CC", "gcc"), *WARNINGS, *flags, "-o", str(scratch), *map(str, sources)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
        scratch.replace(target)


class BuildParts(build_ext):
    """build_ext that compiles the C parts in place of Python extensions."""

    def run(self) -> None:
        compile_parts()


class NativeDistribution(Distribution):
    """A distribution with compiled parts: its wheel is bound to the platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_ext": BuildParts}, distclass=NativeDistribution)
