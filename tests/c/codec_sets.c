/* Every instruction set of the codecs against the portable C, under sanitizers, and on other processors:
 *
 *   gcc -std=gnu11 -O0 -g -fsanitize=address,undefined -Iinclude tests/c/codec_sets.c -o codec_sets && ./codec_sets
 *   aarch64-linux-gnu-gcc -std=gnu11 -O2 -static -Iinclude tests/c/codec_sets.c -o codec_sets && \
 *       qemu-aarch64 codec_sets
 *
 * Planes of every head size and width are packed, damaged and unpacked, in memory that ends where the plane does. The
 * sum of all that was written is the same on every processor.
 */
#include <stdio.h>
#include <stdlib.h>

#include "kvortex/codec.h"

enum { MAX_ROWS = 35, ROUNDS = 40 };
static const uint64_t EXPECTED_SUM = 0x42a32e4c60f6ce9d;

static uint64_t random_state = 1, sum = 0xcbf29ce484222325;

static uint32_t random_below(uint32_t limit)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % limit);
}

static void add_to_sum(const char *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        sum = (sum ^ (uint8_t)bytes[i]) * 0x100000001b3;
}

static void
require_same(const char *a, const char *b, size_t count, const char *set, const kv_plane *plane, const char *what)
{
    if (memcmp(a, b, count) != 0) {
        fprintf(stderr, "codec_sets: %s %s %u rows of %u numbers in %u bits otherwise than the portable C\n", set, what,
                plane->num_rows, plane->row_bytes / 2, plane->bits);
        exit(1);
    }
}

/* Numbers of one size, of all sizes, tiny ones, and any bits. */
static void fill_row(char *row, uint32_t dim, uint32_t kind)
{
    for (uint32_t i = 0; i < dim; i++) {
        const uint32_t sign = random_below(2) << 15;
        uint32_t bits = 0x3F00 + random_below(0x100);
        if (kind == 1)
            bits = random_below(KV_CODEC_HUGE);
        else if (kind == 2)
            bits = random_below(0x480);
        else if (kind == 3)
            bits = random_below(0x8000);
        kv_codec_store(row + 2 * i, sign | bits);
    }
}

static void check(uint32_t dim, uint32_t bits, uint32_t num_rows)
{
    const uint32_t row_bytes = 2 * dim, step_bytes = row_bytes + 16 * random_below(3);
    const kv_plane plane = {.num_rows = num_rows, .row_bytes = row_bytes, .step_bytes = step_bytes, .bits = bits};
    const size_t rows_bytes = (size_t)(num_rows - 1) * step_bytes + row_bytes;
    const size_t packed_bytes = kv_plane_packed_bytes(&plane);
    char *const rows = calloc(1, rows_bytes);
    char *const expected_rows = malloc(rows_bytes), *const found_rows = malloc(rows_bytes);
    char *const expected = malloc(packed_bytes), *const found = malloc(packed_bytes);
    const kv_codec_set *portable = kv_codec_best(), *set;
    for (uint32_t i = 0; kv_codec_set_at(i) != NULL; i++)
        portable = kv_codec_set_at(i);
    for (uint32_t i = 0; i < num_rows; i++)
        fill_row(rows + (size_t)i * step_bytes, dim, random_below(12) / 3);

    const uint32_t flag = kv_plane_pack_by(portable, &plane, rows, expected);
    add_to_sum(expected, packed_bytes);
    for (uint32_t i = 0; (set = kv_codec_set_at(i)) != NULL; i++) {
        memset(found, 0xA5, packed_bytes);
        if (kv_plane_pack_by(set, &plane, rows, found) != flag)
            fprintf(stderr, "codec_sets: %s has another flag\n", set->name), exit(1);
        require_same(expected, found, packed_bytes, set->name, &plane, "packs");
    }
    for (uint32_t damage = 0; damage < 2; damage++) {
        memset(expected_rows, 0xA5, rows_bytes);
        kv_plane_unpack_by(portable, &plane, expected, expected_rows);
        add_to_sum(expected_rows, rows_bytes);
        for (uint32_t i = 0; (set = kv_codec_set_at(i)) != NULL; i++) {
            memset(found_rows, 0xA5, rows_bytes);
            kv_plane_unpack_by(set, &plane, expected, found_rows);
            require_same(expected_rows, found_rows, rows_bytes, set->name, &plane, "unpacks");
        }
        for (size_t i = 0; i < packed_bytes; i += 1 + random_below(8))
            expected[i] = (char)random_below(256);
    }
    free(rows), free(expected_rows), free(found_rows), free(expected), free(found);
}

int main(void)
{
    static const uint32_t widths[] = {8, 6, 5, 4};
    for (uint32_t round = 0; round < ROUNDS; round++)
        for (uint32_t dim = 32; dim <= KV_CODEC_MAX_DIM; dim *= 2)
            for (uint32_t i = 0; i < 4; i++)
                check(dim, widths[i], 1 + random_below(MAX_ROWS));
    if (sum != EXPECTED_SUM) {
        fprintf(stderr, "codec_sets: the sum of all bytes is 0x%llx, not that of other processors\n",
                (unsigned long long)sum);
        return 1;
    }
    return 0;
}
