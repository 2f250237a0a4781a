/* dlpack.h: what a DLPack capsule holds, versions 0 and 1, as far as KVortex reads and writes it.
 *
 * Invariants
 *   - The layout is that of the DLPack standard (dmlc/dlpack); tests exchange capsules with numpy and torch, and with
 *     structs of their own. Types are ours, so no header of DLPack is needed to build.
 *   - Who takes a capsule (and renames it, so that nobody takes it again) calls the deleter exactly once, or never when
 *     it is NULL. The deleter is the producer's: it may need the GIL and takes it by itself.
 */
#ifndef KVORTEX_DLPACK_H
#define KVORTEX_DLPACK_H

#include <stdint.h>

enum { /* DLDeviceType, those whose memory KVortex can copy */
    KV_DLPACK_CPU = 1,
    KV_DLPACK_CUDA = 2,
    KV_DLPACK_CUDA_HOST = 3,
    KV_DLPACK_CUDA_MANAGED = 13
};
enum { KV_DLPACK_UINT = 1 };                               /* DLDataTypeCode, the one KVortex hands out */
enum { KV_DLPACK_READ_ONLY = 1, KV_DLPACK_IS_COPIED = 2 }; /* flags of version 1 */

typedef struct kv_dlpack_tensor { /* DLTensor */
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL: C-contiguous */
    uint64_t byte_offset;
} kv_dlpack_tensor;

typedef struct kv_dlpack_managed { /* DLManagedTensor, the content of a "dltensor" */
    kv_dlpack_tensor tensor;
    void *manager;
    void (*deleter)(struct kv_dlpack_managed *);
} kv_dlpack_managed;

typedef struct kv_dlpack_versioned { /* DLManagedTensorVersioned, the content of a "dltensor_versioned" */
    uint32_t major, minor;           /* with another major only these two and the deleter may be touched */
    void *manager;
    void (*deleter)(struct kv_dlpack_versioned *);
    uint64_t flags;
    kv_dlpack_tensor tensor;
} kv_dlpack_versioned;

#endif
