"""Addresses, shapes and strides of other libraries' tensors, without importing any of them."""


def address_of(memory):
    """The address of an int or of an object with `__cuda_array_interface__`, `__array_interface__`, `data_ptr()` or
    `address`."""
    if isinstance(memory, int):
        return memory
    for interface in ("__cuda_array_interface__", "__array_interface__"):
        description = getattr(memory, interface, None)
        if description is not None:
            return description["data"][0]
    if hasattr(memory, "data_ptr"):
        return memory.data_ptr()
    if isinstance(getattr(memory, "address", None), int):
        return memory.address
    raise TypeError(
        f"{type(memory).__name__} has no address that KVortex can read; pass an int, or an object with "
        f"__cuda_array_interface__, __array_interface__ or data_ptr()"
    )


def describe(tensor):
    """Address, shape, strides in bytes and itemsize in bytes of a tensor."""
    if hasattr(tensor, "data_ptr"):  # torch; before the interfaces, which torch refuses for bfloat16
        itemsize = tensor.element_size()
        return tensor.data_ptr(), tuple(tensor.shape), tuple(step * itemsize for step in tensor.stride()), itemsize
    for interface in ("__cuda_array_interface__", "__array_interface__"):
        description = getattr(tensor, interface, None)
        if description is None:
            continue
        shape, itemsize = tuple(description["shape"]), int(description["typestr"][2:])
        strides = description.get("strides")
        if strides is None:
            strides, step = [], itemsize
            for count in reversed(shape):
                strides.insert(0, step)
                step *= count
        return description["data"][0], shape, tuple(strides), itemsize
    raise TypeError(
        f"{type(tensor).__name__} describes no strides; pass an object with data_ptr(), "
        f"__cuda_array_interface__ or __array_interface__"
    )
