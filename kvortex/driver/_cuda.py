"""Finds the CUDA driver and the addresses of its entry points, through cuda-python.

`cuda.bindings` is imported only when a CUDA device is asked for, so that the package works on machines without it.
"""

from kvortex.errors import ConfigError, DriverError

LEGACY_STREAM = 1  # CU_GET_PROC_ADDRESS_LEGACY_STREAM: stream 0 is the legacy default stream
NO_DEVICE = 100
USE_HOST = "or use device='host'"


def load_addresses(rows, min_version):
    """Return the address of each driver entry point.

    Parameters
    ----------
    rows : iterable of (field, symbol, version)
        The base name of each symbol and the CUDA version whose signature is wanted; the driver picks the variant
        (``cuMemAlloc`` at 3020 is ``cuMemAlloc_v2``).
    min_version : int
        The driver version below which loading is refused.

    Returns
    -------
    dict of str to int

    Raises
    ------
    ConfigError
        cuda-python or the driver is missing or too old, or there is no device.
    DriverError
        The driver is there and fails.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(
            f"device='cuda' needs cuda.bindings ({error}); pip install cuda-python, {USE_HOST}"
        ) from error
    try:
        (code,) = driver.cuInit(0)
    except Exception as error:  # which type says "no library" differs between releases of cuda-python
        raise ConfigError(
            f"the CUDA driver library libcuda.so.1 cannot be loaded ({error}); install the NVIDIA driver, {USE_HOST}"
        ) from error
    if code == NO_DEVICE:
        raise ConfigError(f"the CUDA driver sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES, {USE_HOST}")
    require_success(code, "cuInit")
    code, version = driver.cuDriverGetVersion()
    require_success(code, "cuDriverGetVersion")
    if version < min_version:
        raise ConfigError(
            f"the CUDA driver supports CUDA {version_text(version)}, KVortex needs {version_text(min_version)} or "
            f"later; update the NVIDIA driver, {USE_HOST}"
        )
    code, count = driver.cuDeviceGetCount()
    if code == NO_DEVICE or count == 0:
        raise ConfigError(f"the CUDA driver sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES, {USE_HOST}")
    require_success(code, "cuDeviceGetCount")
    return {field: entry_point(driver, symbol, row_version) for field, symbol, row_version in rows}


def entry_point(driver, symbol, version):
    # Early releases of cuda-python answer (code, address), later ones add why there is none.
    code, address, *status = driver.cuGetProcAddress(symbol.encode(), version, LEGACY_STREAM)
    if code or not address:
        raise ConfigError(
            f"the CUDA driver has no {symbol} of CUDA {version_text(version)} (cuGetProcAddress answered {code!r}, "
            f"{status}); update the NVIDIA driver, {USE_HOST}"
        )
    return int(address)


def require_success(code, call):
    if code:
        raise DriverError(int(code), str(getattr(code, "name", code)), call)


def version_text(version):
    return f"{version // 1000}.{version % 1000 // 10}"
