/* histogram.h: latencies in log-linear buckets, four to every power of two.
 *
 * Invariants
 *   - Every value below 2^63 ns has exactly one bucket; a bucket is at most 25 % wide, so a reported percentile is
 *     the upper edge of its bucket and at most 25 % above the true one.
 *   - Not synchronised: its owner's lock guards it.
 *
 * Costs: add is O(1), about 2 ns; a percentile walks 256 counters; 2 KiB each.
 */
#ifndef KVORTEX_HISTOGRAM_H
#define KVORTEX_HISTOGRAM_H

#include <stdint.h>

enum { KV_HISTOGRAM_BUCKETS = 256 };

typedef struct kv_histogram {
    uint64_t count;
    uint64_t buckets[KV_HISTOGRAM_BUCKETS];
} kv_histogram;

static inline unsigned kv_histogram_bucket(uint64_t value)
{
    if (value < 4)
        return (unsigned)value;
    unsigned exponent = 63u - (unsigned)__builtin_clzll(value);
    return exponent * 4u - 4u + (unsigned)((value >> (exponent - 2u)) & 3u);
}

/* The largest value that falls into the bucket. */
static inline uint64_t kv_histogram_upper_edge(unsigned bucket)
{
    if (bucket < 4)
        return bucket;
    unsigned exponent = bucket / 4u + 1u;
    return ((uint64_t)(bucket % 4u + 5u) << (exponent - 2u)) - 1u;
}

static inline void kv_histogram_add(kv_histogram *histogram, uint64_t value)
{
    histogram->count++;
    histogram->buckets[kv_histogram_bucket(value)]++;
}

/* The value below which `fraction` of the samples lie; 0 when there is none. */
static inline uint64_t kv_histogram_percentile(const kv_histogram *histogram, double fraction)
{
    uint64_t wanted = (uint64_t)(fraction * (double)histogram->count), seen = 0;
    if (!histogram->count)
        return 0;
    if (wanted >= histogram->count)
        wanted = histogram->count - 1;
    for (unsigned bucket = 0; bucket < KV_HISTOGRAM_BUCKETS; bucket++) {
        seen += histogram->buckets[bucket];
        if (seen > wanted)
            return kv_histogram_upper_edge(bucket);
    }
    return UINT64_MAX;
}

#endif
