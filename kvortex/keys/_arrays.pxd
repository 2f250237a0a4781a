"""What callers pass as keys, checked once at the door. Inline: every module that cimports it has its own copy."""

cimport cython
from libc.stdint cimport uint8_t

from kvortex._c cimport KV_KEY_BYTES


@cython.boundscheck(True)  # in modules that switch it off, too: shapes come from others
cdef inline const uint8_t[:, ::1] as_keys(object keys):
    """View `keys` as C-contiguous (n, 32) uint8; TypeError if it is no uint8 array, ValueError for another shape."""
    cdef const uint8_t[:, ::1] view
    dtype = getattr(keys, "dtype", None)
    if getattr(dtype, "char", "") == "B":  # nearly always; the rest says what is wrong
        try:
            view = keys
            if view.shape[1] == KV_KEY_BYTES:
                return view
        except (TypeError, ValueError):
            pass
    shape = getattr(keys, "shape", None)
    if not isinstance(shape, tuple) or dtype is None:
        hint = ("write numpy.frombuffer(b''.join(keys), numpy.uint8).reshape(-1, 32)" if isinstance(keys, (list, tuple))
                else "kvortex.block_keys makes one")
        raise TypeError(f"keys must be an (n, {KV_KEY_BYTES}) uint8 array, got {type(keys).__name__}; {hint}")
    if hasattr(keys, "numpy"):
        raise TypeError(f"keys must be an (n, {KV_KEY_BYTES}) uint8 array of numpy, got {type(keys).__name__}; write "
                        "keys.cpu().numpy()")
    if getattr(dtype, "char", "") != "B" and dtype != "uint8":  # numpy reads a name anew each time it compares with one
        raise TypeError(f"keys must have dtype uint8, got {dtype}")
    if len(shape) != 2 or shape[1] != KV_KEY_BYTES:
        raise ValueError(f"keys must have shape (n, {KV_KEY_BYTES}), got {shape}")
    try:
        view = keys
    except ValueError:
        raise ValueError("keys must be C-contiguous; pass numpy.ascontiguousarray(keys)") from None
    except TypeError:
        raise TypeError(f"keys must have a buffer, and {type(keys).__name__} has none") from None
    if view.shape[1] != KV_KEY_BYTES:  # a subclass may say one shape and hold another
        raise ValueError(f"keys must have shape (n, {KV_KEY_BYTES}), got a buffer of {view.shape[0]} x {view.shape[1]}")
    return view
