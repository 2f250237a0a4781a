/* Records of include/kvortex/ecsq.h, damaged in every way, in memory that ends where they do, under sanitizers:
 *
 *   gcc -std=gnu11 -O1 -g -fsanitize=address,undefined -fsanitize-coverage=trace-pc -Iinclude tests/c/ecsq_mutated.c \
 *       -lm -o ecsq_mutated && ./ecsq_mutated kvortex/codec/ecsq_tables.bin 1000000 1
 *
 * Arguments: the tables, how many records, a seed. With -fsanitize-coverage=trace-pc, a record that leads the decoder
 * where none led it before is damaged further. Every instruction set must decode what it decodes alike. Prints how many
 * records there were, how many were refused, and how many were kept for where they led; and a sum of all that was coded
 * and decoded, which without that flag is the same on every processor:
 *
 *   aarch64-linux-gnu-gcc -std=gnu11 -O2 -static -Iinclude tests/c/ecsq_mutated.c -lm -o ecsq_mutated && \
 *       qemu-aarch64 ecsq_mutated kvortex/codec/ecsq_tables.bin 20000 1
 */
#include <stdio.h>
#include <stdlib.h>

#include "kvortex/ecsq.h"

enum { MAX_KEPT = 4096, MAP_SIZE = 1 << 13 };

static uint64_t random_state, sum = 0xcbf29ce484222325;
static uint8_t seen[MAP_SIZE], reached[MAP_SIZE];
static uintptr_t before;
static struct {
    char *bytes;
    uint64_t nbytes;
    uint32_t kind;
} kept[MAX_KEPT];
static uint32_t num_kept;

void __sanitizer_cov_trace_pc(void);
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((no_sanitize_coverage, no_sanitize("address", "undefined")))
#endif
void __sanitizer_cov_trace_pc(void)
{
    const uintptr_t here = (uintptr_t)__builtin_return_address(0);
    reached[(here ^ before >> 1) % MAP_SIZE] = 1;
    before = here;
}

static uint32_t random_below(uint64_t limit)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % limit);
}

static void add_to_sum(const char *bytes, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        sum = (sum ^ (uint8_t)bytes[i]) * 0x100000001b3;
}

static void *memory(uint64_t nbytes)
{
    void *const found = malloc(nbytes ? nbytes : 1);
    if (found == NULL)
        exit(2);
    return found;
}

static void keep(const char *bytes, uint64_t nbytes, uint32_t kind)
{
    if (num_kept == MAX_KEPT)
        return;
    kept[num_kept].bytes = memory(nbytes);
    memcpy(kept[num_kept].bytes, bytes, nbytes);
    kept[num_kept].nbytes = nbytes;
    kept[num_kept++].kind = kind;
}

/* Whether this run led where none led before. */
static int is_new(void)
{
    int found = 0;
    for (uint32_t i = 0; i < MAP_SIZE; i += 8) {
        uint64_t now, ever;
        memcpy(&now, reached + i, 8);
        memcpy(&ever, seen + i, 8);
        found |= (now & ~ever) != 0;
        ever |= now;
        memcpy(seen + i, &ever, 8);
    }
    memset(reached, 0, sizeof reached);
    return found;
}

/* --- What is coded ----------------------------------------------------------------------------------------------- */

enum { NUM_PLANES = 6, BLOCK_BYTES = 5 * 2 * 96 + 3 * 128 + 64 + 4 * 3 * 64 + 512 + 2 * 256 };
static const kv_ecsq_plane planes[NUM_PLANES] = {
    {0, 10, 64, 96, 5, 2, 2, 1, KV_ECSQ_K},        {960, 3, 128, 128, 3, 1, 1, 1, KV_ECSQ_V},
    {1344, 1, 64, 64, 1, 1, 1, 1, KV_ECSQ_EXACT},  {1408, 12, 64, 64, 4, 3, 1, 4, KV_ECSQ_V},
    {2176, 1, 512, 512, 1, 1, 1, 1, KV_ECSQ_K},    {2688, 2, 256, 256, 2, 1, 1, 1, KV_ECSQ_K},
};
static const uint32_t segments[] = {0, 3, 5, NUM_PLANES};

/* Numbers about 1; some far out, some of them none. */
static void fill(char *block, uint32_t kind)
{
    for (uint32_t i = 0; i < BLOCK_BYTES; i += 2) {
        uint32_t bits = (0x3F00 + random_below(0x100)) | random_below(2) << 15;
        if (kind % 3 == 1 && random_below(50) == 0)
            bits = 0x4300 + random_below(0x180);
        if (kind % 3 == 2 && i >= 1408 && i < 2176)
            bits = random_below(1 << 16);
        kv_codec_store(block + i, bits);
    }
}

static uint64_t mutate(const kv_ecsq *ecsq, char *record, uint64_t nbytes)
{
    static const uint32_t special[] = {0, 1, 2, 47, 48, 127, 128, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF};
    const uint64_t body = kv_ecsq_body_offset(ecsq);
    const uint64_t first = random_below(8) ? body : random_below(4) ? KV_ECSQ_HEADER_BYTES : 0;
    for (uint32_t i = 1 + random_below(4); i-- > 0;) {
        const uint64_t at = first + random_below(random_below(3) ? nbytes - first : 64);
        const uint32_t number = special[random_below(sizeof special / sizeof special[0])];
        switch (random_below(5)) {
        case 0: record[at] ^= (char)(1 << random_below(8)); break;
        case 1: record[at] = (char)number; break;
        case 2: record[at] = (char)random_below(256); break;
        case 3:
            for (uint64_t j = at; j < at + 32 && j < nbytes; j++)
                record[j] = (char)random_below(256);
            break;
        default:
            if (at + 4 <= nbytes)
                memcpy(record + at, &number, 4);
        }
    }
    if (random_below(4) == 0)
        nbytes -= random_below(random_below(2) ? 8 : nbytes - body);
    if (random_below(8)) { /* the header and the lengths agree again */
        uint64_t left = nbytes - body;
        for (uint32_t i = 0; i < ecsq->num_segments; i++) {
            char *const length = record + KV_ECSQ_HEADER_BYTES + 4 * i;
            if (i + 1 == ecsq->num_segments || kv_ecsq_load_u32(length) > left)
                kv_ecsq_store_u32(length, left);
            left -= kv_ecsq_load_u32(length);
        }
        kv_ecsq_put_header(ecsq, nbytes, record);
    }
    return nbytes;
}

/* The instruction sets must agree; a set must not touch what lies between the rows of plane 0. */
static int decode(const kv_ecsq *ecsq, const char *record, uint64_t nbytes, uint32_t first_set, uint32_t num_sets)
{
    char *const exact = memory(nbytes), *blocks[2] = {memory(BLOCK_BYTES), memory(BLOCK_BYTES)};
    int whole = 0;
    memcpy(exact, record, nbytes);
    for (uint32_t i = 0; i < num_sets; i++) {
        char *const block = blocks[i != 0];
        memset(block, 0x5A, BLOCK_BYTES);
        const int found = kv_ecsq_decode_by(kv_ecsq_set_at(first_set + i), ecsq, exact, nbytes, block);
        for (uint32_t at = 0; at < 960; at++)
            if (at % 96 >= 64 && block[at] != 0x5A)
                exit(3);
        if (i > 0 && (found != whole || (whole && memcmp(blocks[0], block, BLOCK_BYTES) != 0))) {
            fprintf(stderr, "ecsq_mutated: %s decodes otherwise\n", kv_ecsq_set_at(i)->name);
            exit(4);
        }
        whole = found;
    }
    if (whole)
        add_to_sum(blocks[0], BLOCK_BYTES);
    free(exact), free(blocks[0]), free(blocks[1]);
    return whole;
}

int main(int argc, char **argv)
{
    static uint16_t frequencies[KV_ECSQ_CLASSES][KV_ECSQ_SYMBOLS];
    static kv_ecsq_tables tables;
    FILE *const file = argc == 4 ? fopen(argv[1], "rb") : NULL;
    if (file == NULL || fread(frequencies, sizeof frequencies, 1, file) != 1
        || !kv_ecsq_build_tables((const uint16_t(*)[KV_ECSQ_SYMBOLS])frequencies, 7, &tables))
        return 2;
    fclose(file);
    const uint64_t count = strtoull(argv[2], NULL, 10);
    random_state = strtoull(argv[3], NULL, 10);
    uint32_t num_sets = 0;
    while (kv_ecsq_set_at(num_sets) != NULL)
        num_sets++;
    kv_ecsq ecsq[KV_ECSQ_LEVELS];
    for (uint32_t level = 1; level <= KV_ECSQ_LEVELS; level++) {
        ecsq[level - 1] =
            (kv_ecsq){.planes = planes, .segments = segments, .tables = &tables, .block_bytes = BLOCK_BYTES,
                      .num_planes = NUM_PLANES, .num_segments = 3, .level = level, .vector_numbers = 32};
        ecsq[level - 1].needs = kv_ecsq_needs_of(&ecsq[level - 1]);
    }
    const uint64_t most = kv_ecsq_max_bytes(&ecsq[0]);
    char *const block = memory(BLOCK_BYTES), *const record = memory(most), *const other = memory(most);
    void *const scratch = memory(kv_ecsq_scratch_bytes(&ecsq[0]));
    for (uint32_t kind = 0; kind < 24; kind++) {
        fill(block, kind);
        const kv_ecsq *const chosen = &ecsq[kind % KV_ECSQ_LEVELS];
        const uint64_t nbytes = kv_ecsq_encode(chosen, block, record, most, scratch);
        const uint64_t less = random_below(nbytes);
        for (uint32_t i = 0; i < num_sets; i++) {
            char *const exact = memory(nbytes);
            if (kv_ecsq_encode_by(kv_ecsq_set_at(i), chosen, block, other, most, scratch) != nbytes
                || memcmp(record, other, nbytes) != 0
                || kv_ecsq_encode_by(kv_ecsq_set_at(i), chosen, block, exact, nbytes, scratch) != nbytes
                || kv_ecsq_encode_by(kv_ecsq_set_at(i), chosen, block, exact, less, scratch) != 0)
                return 5;
            free(exact);
        }
        if (!decode(chosen, record, nbytes, 0, num_sets))
            return 6;
        add_to_sum(record, nbytes);
        keep(record, nbytes, kind % KV_ECSQ_LEVELS);
    }
    uint64_t refused = 0;
    is_new();
    for (uint64_t i = 0; i < count; i++) {
        const uint32_t from = random_below(num_kept);
        const kv_ecsq *const chosen = &ecsq[kept[from].kind];
        memcpy(record, kept[from].bytes, kept[from].nbytes);
        const uint64_t nbytes = mutate(chosen, record, kept[from].nbytes);
        refused += i % 4 ? !decode(chosen, record, nbytes, (uint32_t)(i % num_sets), 1)
                         : !decode(chosen, record, nbytes, 0, num_sets);
        if (is_new() && nbytes > kv_ecsq_body_offset(chosen) + 64)
            keep(record, nbytes, kept[from].kind);
    }
    printf("%llu records, %llu refused, %u kept, sum %016llx\n", (unsigned long long)count, (unsigned long long)refused,
           num_kept, (unsigned long long)sum);
    while (num_kept-- > 0)
        free(kept[num_kept].bytes);
    free(block), free(record), free(other), free(scratch);
    return 0;
}
