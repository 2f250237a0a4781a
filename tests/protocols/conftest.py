"""A CUDA driver without a GPU, for programs that talk to one."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def libcuda_of_the_host_driver(tmp_path_factory):
    """The environment of a Python that finds the host driver as libcuda.so.1, and the producers of these tests."""
    folder = tmp_path_factory.mktemp("libcuda")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-std=gnu11", "-O1", "-fvisibility=hidden", "-pthread", "-I", ROOT / "include"]
        + ["-o", folder / "libcuda.so.1", ROOT / "tests/driver/libcuda_host.c"]
        + sorted((ROOT / "kvortex/driver").glob("host_*.c")),
        check=True,
    )
    path = os.pathsep.join([str(ROOT), str(HERE)])
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": path}
