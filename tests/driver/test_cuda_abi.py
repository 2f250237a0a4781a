"""The driver table against the CUDA that is installed: signatures, versions, struct layouts."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from cuda.bindings import cydriver

from kvortex.driver._device import driver_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# What CUDA's names come down to in driver.h. Handles are opaque pointers, enums and devices are ints.
OURS = {
    "CUresult": "int",
    "kv_result": "int",
    "CUdevice": "int",
    "CUdevice_attribute": "int",
    "CUpointer_attribute": "int",
    "CUstreamCaptureMode": "int",
    "CUstreamCaptureStatus": "int",
    "CUcontext": "void *",
    "CUstream": "void *",
    "CUevent": "void *",
    "CUmodule": "void *",
    "CUfunction": "void *",
    "CUmemoryPool": "void *",
    "CUmemPool_attribute": "int",
    "CUmemAllocationGranularity_flags": "int",
    "CUmemGenericAllocationHandle": "unsigned long long",
    "unsigned PY_LONG_LONG": "unsigned long long",
    "CUdeviceptr": "kv_devptr",
    "CUDA_MEMCPY2D": "kv_memcpy_2d",
    "CUmemcpyAttributes": "kv_memcpy_attributes",
    "CUmemPoolProps": "kv_mem_pool_props",
    "CUmemAllocationProp": "kv_mem_allocation_props",
    "CUmemAccessDesc": "kv_mem_access",
}


def canonical(parameter_type):
    """Spell a C type in one way: ours for CUDA's, no const, pointers without spaces."""
    base = re.sub(r"\bconst\b|\*", "", parameter_type).strip()
    stars = parameter_type.count("*")
    ours = OURS.get(base, base)
    return ours.replace(" *", "") + "*" * (stars + ours.count("*"))


def our_signature(parameters):
    found = []
    if parameters == "(void)":
        return []
    for parameter in parameters.strip("()").split(","):
        declared = re.fullmatch(r"\s*(.*?)(\w+)\s*", parameter, re.S)
        found.append(canonical(declared[1]))
    return found


def their_signature(symbol):
    """The parameter types of a function, from the name of the capsule that cuda-python exports it with."""
    text = re.search(r'"(.*)"', repr(cydriver.__pyx_capi__[symbol]))[1]
    result, parameters = re.fullmatch(r"(\w+) \((.*)\)", text).groups()
    assert result == "CUresult"
    return [] if parameters == "void" else [canonical(parameter) for parameter in parameters.split(",")]


@pytest.mark.parametrize(("symbol", "parameters"), [row[1::2] for row in driver_rows()], ids=lambda value: value)
def test_row_has_the_signature_of_cuda_python(symbol, parameters):
    theirs = their_signature(symbol)
    if symbol == "cuMemcpyBatchAsync" and len(theirs) == 8:
        # The one exception. CUDA 13 took `failIdx` out; we ask the driver for the function of 12.8, which has it before
        # the stream. cuda_header_asserts.c checks that CUDA 13 still declares that version.
        theirs.insert(-1, "size_t*")
    assert our_signature(parameters) == theirs


def test_the_comparison_sees_a_wrong_signature():
    assert our_signature("(void *target, kv_devptr source, size_t bytes)") != their_signature("cuMemcpyDtoHAsync")
    assert our_signature("(void **stream, int flags)") != their_signature("cuStreamCreate")


def cuda_include():
    """The folder of the cuda.h in the nvidia-cuda-runtime wheel."""
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("the test dependency nvidia-cuda-runtime is missing; pip install 'kvortex[test]'")
    return next(file.locate().parent for file in files if file.name == "cuda.h")


def compile_asserts(include):
    command = ["gcc", "-std=gnu11", "-Wall", "-Werror", "-fsyntax-only", "-I", include]
    command += ["-isystem", cuda_include(), HERE / "cuda_header_asserts.c"]
    return subprocess.run(command, capture_output=True, text=True)


def test_structs_constants_and_versions_are_those_of_cuda_h():
    done = compile_asserts(ROOT / "include")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("size_t source_pitch;", "unsigned int source_pitch;", "source_pitch"),
        ("unsigned char reserved[54];", "unsigned char reserved[56];", "kv_mem_pool_props"),
        ("KV_CUDA_NOT_READY = 600", "KV_CUDA_NOT_READY = 601", "KV_CUDA_NOT_READY is not CUDA_ERROR_NOT_READY"),
        ("cuMemAlloc, 3020", "cuMemAlloc, 3030", "PFN_cuMemAlloc_v3030"),
    ],
)
def test_the_layout_check_sees_a_wrong_header(tmp_path, right, wrong, complaint):
    header = (ROOT / "include/kvortex/driver.h").read_text()
    assert right in header
    (tmp_path / "kvortex").mkdir()
    (tmp_path / "kvortex/driver.h").write_text(header.replace(right, wrong))
    done = compile_asserts(tmp_path)
    assert done.returncode != 0 and complaint in done.stderr
