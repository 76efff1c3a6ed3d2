"""Build the two C parts next to their sources: a static sandbox binary and the decode engine.

Both are plain `gcc` calls (the sandbox binary is not a Python extension) in place of build_ext, and run
before build_py collects package data, so that `pip install .` and `pip install -e .` both have them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
NATIVE = ROOT / "dsec/native"
EMBEDDED = ROOT / "rollout/engines/embedded"
# No contraction: multiply-adds are fused only where the source says so, so that every build draws the same tokens.
ENGINE_FLAGS = [
    *("-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *(["-march=x86-64-v3"] if platform.machine() == "x86_64" else []),
]


def engine_digest() -> str:
    """What the engine is built from (sources and flags): recorded with every token it draws."""
    digest = hashlib.sha256(" ".join(ENGINE_FLAGS).encode())
    for path in sorted([*EMBEDDED.glob("*.c"), *EMBEDDED.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


PARTS = (
    (
        EMBEDDED / "v4.so",
        sorted(EMBEDDED.glob("*.c")),
        sorted(EMBEDDED.glob("*.h")),
        [*ENGINE_FLAGS, f'-DV4_BUILD="{engine_digest()}"'],
    ),
    (NATIVE / "dsec-sandbox", sorted(NATIVE.glob("*.c")), sorted(NATIVE.glob("*.h")), ["-O2", "-static"]),
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
        """Compile what is older than its sources."""
        compile_parts()


class BuildPython(build_py):
    """build_py that has the C parts compiled first: they are package data."""

    def run(self) -> None:
        """Compile, then collect."""
        self.run_command("build_ext")
        super().run()


class NativeDistribution(Distribution):
    """A distribution with compiled parts: its wheel is bound to the platform."""

    def has_ext_modules(self) -> bool:
        """Always: the wheel holds machine code."""
        return True


setup(cmdclass={"build_ext": BuildParts, "build_py": BuildPython}, distclass=NativeDistribution)
