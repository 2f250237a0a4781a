"""The host driver's table, and the controls with which tests make it late or broken."""

from kvortex._c cimport kv_driver


cdef const kv_driver *host_table() noexcept nogil
