"""Marks of tests that need something which a machine may lack."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


@functools.cache
def has_compiler() -> bool:
    """Whether a C++ compiler is found and builds a program with the standard library."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    command = next((path for name in names if name and (path := shutil.which(name))), None)
    if command is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "main.cpp")
        source.write_text("#include <vector>\nint main() { return int(std::vector<int>(1).size()) - 1; }\n")
        built = subprocess.run([command, source, "-o", Path(folder, "main")], capture_output=True, check=False)
    return built.returncode == 0


requires_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
