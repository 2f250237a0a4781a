/* ecsq_format.h: what a record of ecsq.h has, its tables and sizes, and what an encoder decides about a plane. */
#ifndef KVORTEX_ECSQ_FORMAT_H
#define KVORTEX_ECSQ_FORMAT_H

#include <math.h>

#include "codec_rows.h"

enum {
    KV_ECSQ_VERSION = 1,
    KV_ECSQ_MAGIC = 0x3143564B, /* "KVC1" */
    KV_ECSQ_CODEC = 5,
    KV_ECSQ_LEVELS = 4,
    KV_ECSQ_HEADER_BYTES = 40,
    KV_ECSQ_CLASSES = 48, /* 24 sizes, each with light and with heavy tails */
    KV_ECSQ_SYMBOLS = 256,
    KV_ECSQ_LARGEST = 126,  /* symbol s stands for s - KV_ECSQ_LARGEST, but for the escape */
    KV_ECSQ_ESCAPE = 255,
    KV_ECSQ_PROB_BITS = 12, /* the frequencies of a class add up to 2^12 */
    KV_ECSQ_LANES = 32,
    KV_ECSQ_GROUP = 64,     /* channels that share a class */
    KV_ECSQ_SEGMENT = 65536, /* numbers from which on a segment is full */
    KV_ECSQ_FIRST_STATE = 1 << 16,
    KV_ECSQ_MIN_STEP = 0x2680, /* 2^-50 as a bfloat16 */
    KV_ECSQ_MAX_STEP = 0x5D80, /* 2^60 */
    KV_ECSQ_MAX_INTEGER = 16000, /* so that differences fit into the 16 bits of an escape */
    KV_ECSQ_NO_GAIN = 4,
    KV_ECSQ_STATES_BYTES = 4 * KV_ECSQ_LANES,
    KV_ECSQ_HEAD_BYTES = 4 /* of a plane: step, differences or not, raw or not */
};

/* Vectors of 16 numbers. */
typedef float kv_e_floats __attribute__((vector_size(64)));
typedef int32_t kv_e_ints __attribute__((vector_size(64)));
typedef uint32_t kv_e_uints __attribute__((vector_size(64)));
typedef int16_t kv_e_shorts __attribute__((vector_size(32)));
typedef uint16_t kv_e_halves __attribute__((vector_size(32)));
typedef uint8_t kv_e_bytes __attribute__((vector_size(16)));

enum kv_ecsq_role { KV_ECSQ_EXACT, KV_ECSQ_K, KV_ECSQ_V };

typedef struct kv_ecsq_plane {
    uint64_t first_byte; /* of row 0 in the block */
    uint32_t num_rows, row_bytes, step_bytes;
    uint32_t num_tokens, num_heads; /* their product is num_rows */
    uint32_t token_rows, head_rows; /* rows from a token, from a head, to the next */
    uint32_t role;
} kv_ecsq_plane;

typedef struct kv_ecsq_tables {
    uint32_t decode[KV_ECSQ_CLASSES][1 << KV_ECSQ_PROB_BITS]; /* slot: frequency << 20 | bias << 8 | symbol */
    uint32_t encode[KV_ECSQ_CLASSES][KV_ECSQ_SYMBOLS];        /* symbol: frequency << 16 | first slot */
    uint16_t frequencies[KV_ECSQ_CLASSES][KV_ECSQ_SYMBOLS], firsts[KV_ECSQ_CLASSES][KV_ECSQ_SYMBOLS]; /* the same */
    uint64_t chosen[256], places[256]; /* mask of 8 lanes: bytes with the lanes it has; with the rank of each lane */
    int32_t least[KV_ECSQ_CLASSES], most[KV_ECSQ_CLASSES];    /* integers that have a symbol */
    uint32_t id;
} kv_ecsq_tables;

/* The parts of scratch memory for one segment, in numbers of each. */
typedef struct kv_ecsq_needs {
    uint64_t symbols, vectors, group;
} kv_ecsq_needs;

typedef struct kv_ecsq {
    const kv_ecsq_plane *planes;
    const uint32_t *segments; /* the first plane of each segment; num_segments + 1 of them */
    const kv_ecsq_tables *tables;
    uint64_t block_bytes;
    kv_ecsq_needs needs; /* kv_ecsq_needs_of */
    uint32_t num_planes, num_segments, level, planes_crc, vector_numbers;
} kv_ecsq;

/* Where an encoder is in a segment. */
typedef struct kv_ecsq_run {
    uint32_t class_number, rounds; /* of KV_ECSQ_LANES symbols */
} kv_ecsq_run;

typedef struct kv_ecsq_encoder {
    const kv_ecsq_tables *tables;
    uint32_t level, num_runs;
    uint64_t num_symbols, num_escapes;
    kv_ecsq_run *runs;
    uint8_t *symbols;
    int16_t *escapes;
    uint16_t *words_end; /* words are written downwards from here */
    int16_t *group;      /* integers of a group of channels, token by token */
    float *squares;      /* a vector's: sum of squares; then the inverse of its step */
    int32_t *logarithms; /* of the sums of squares */
    uint8_t *gains;
} kv_ecsq_encoder;

/* Where a decoder is in the stream of a segment. */
typedef struct kv_ecsq_decoder {
    const kv_ecsq_tables *tables;
    const char *words, *words_end, *escapes, *escapes_end;
    char *tail; /* 4 * KV_ECSQ_LANES bytes, for the last words and zeros behind them; NULL: they are in it */
    kv_e_uints states[2];
} kv_ecsq_decoder;

/* --- Tables ------------------------------------------------------------------------------------------------------ */

static const float kv_ecsq_gains[16] = { /* 2^((4 - i) / 4) */
    0x1.0p+1f, 0x1.ae89fap+0f, 0x1.6a09e6p+0f, 0x1.306fe0p+0f,
    0x1.0p+0f, 0x1.ae89fap-1f, 0x1.6a09e6p-1f, 0x1.306fe0p-1f,
    0x1.0p-1f, 0x1.ae89fap-2f, 0x1.6a09e6p-2f, 0x1.306fe0p-2f,
    0x1.0p-2f, 0x1.ae89fap-3f, 0x1.6a09e6p-3f, 0x1.306fe0p-3f};

/* Steps in deviations of the numbers from the mean of their channel, for levels 1 to 4. */
static const double kv_ecsq_steps[KV_ECSQ_LEVELS + 1] = {0, 0.125, 0.18, 0.25, 0.35};

/* Builds the tables; 0 if the frequencies of a class do not add up, or its integers have gaps or no escape. */
static inline int
kv_ecsq_build_tables(const uint16_t frequencies[KV_ECSQ_CLASSES][KV_ECSQ_SYMBOLS], uint32_t id, kv_ecsq_tables *tables)
{
    tables->id = id;
    for (uint32_t mask = 0; mask < 256; mask++) {
        uint64_t rank = 0;
        tables->chosen[mask] = tables->places[mask] = 0;
        for (uint32_t lane = 0; lane < 8; lane++) {
            tables->places[mask] |= rank << (8 * lane);
            if (mask >> lane & 1)
                tables->chosen[mask] |= (uint64_t)lane << (8 * rank++);
        }
    }
    for (uint32_t k = 0; k < KV_ECSQ_CLASSES; k++) {
        int32_t least = -1, most = -2;
        uint32_t slot = 0;
        for (uint32_t symbol = 0; symbol < KV_ECSQ_SYMBOLS; symbol++) {
            const uint32_t frequency = frequencies[k][symbol];
            if (slot + frequency > 1 << KV_ECSQ_PROB_BITS)
                return 0;
            tables->encode[k][symbol] = frequency << 16 | slot;
            tables->frequencies[k][symbol] = (uint16_t)frequency;
            tables->firsts[k][symbol] = (uint16_t)slot;
            for (uint32_t i = 0; i < frequency; i++, slot++)
                tables->decode[k][slot] = frequency << 20 | i << 8 | symbol;
            if (frequency == 0 || symbol == KV_ECSQ_ESCAPE)
                continue;
            if (symbol > 2 * KV_ECSQ_LARGEST || (least >= 0 && most + 1 != (int32_t)symbol))
                return 0;
            least = least < 0 ? (int32_t)symbol : least;
            most = (int32_t)symbol;
        }
        if (slot != 1 << KV_ECSQ_PROB_BITS || least < 0 || frequencies[k][KV_ECSQ_ESCAPE] == 0)
            return 0;
        tables->least[k] = least - KV_ECSQ_LARGEST;
        tables->most[k] = most - KV_ECSQ_LARGEST;
    }
    return 1;
}

/* --- Sizes ------------------------------------------------------------------------------------------------------- */

static inline uint64_t kv_ecsq_plane_bytes(const kv_ecsq_plane *plane)
{
    return (uint64_t)plane->num_rows * plane->row_bytes;
}

static inline uint64_t kv_ecsq_num_channels(const kv_ecsq_plane *plane)
{
    return (uint64_t)plane->num_heads * (plane->row_bytes / 2);
}

static inline uint64_t kv_ecsq_num_groups(const kv_ecsq_plane *plane)
{
    return (kv_ecsq_num_channels(plane) + KV_ECSQ_GROUP - 1) / KV_ECSQ_GROUP;
}

/* Of classes and gains, behind the head of a coded plane. */
static inline uint64_t kv_ecsq_side_bytes(const kv_ecsq_plane *plane)
{
    return 2 * kv_ecsq_num_groups(plane) + ((uint64_t)plane->num_rows + 1) / 2;
}

/* Bytes of a segment that has nothing but raw planes: none is larger. */
static inline uint64_t kv_ecsq_max_segment_bytes(const kv_ecsq *ecsq, uint32_t segment)
{
    uint64_t nbytes = 4;
    for (uint32_t i = ecsq->segments[segment]; i < ecsq->segments[segment + 1]; i++)
        nbytes += KV_ECSQ_HEAD_BYTES + kv_ecsq_plane_bytes(&ecsq->planes[i]);
    return nbytes;
}

static inline uint64_t kv_ecsq_body_offset(const kv_ecsq *ecsq)
{
    return KV_ECSQ_HEADER_BYTES + 4 * (uint64_t)ecsq->num_segments;
}

/* No record is larger. */
static inline uint64_t kv_ecsq_max_bytes(const kv_ecsq *ecsq)
{
    uint64_t nbytes = kv_ecsq_body_offset(ecsq);
    for (uint32_t i = 0; i < ecsq->num_segments; i++)
        nbytes += kv_ecsq_max_segment_bytes(ecsq, i);
    return nbytes;
}

static inline kv_ecsq_needs kv_ecsq_needs_of(const kv_ecsq *ecsq)
{
    kv_ecsq_needs needs = {0, 0, 0};
    for (uint32_t segment = 0; segment < ecsq->num_segments; segment++) {
        uint64_t symbols = 0;
        for (uint32_t i = ecsq->segments[segment]; i < ecsq->segments[segment + 1]; i++) {
            const kv_ecsq_plane *const plane = &ecsq->planes[i];
            if (plane->role == KV_ECSQ_EXACT)
                continue;
            symbols += kv_ecsq_plane_bytes(plane) / 2;
            needs.vectors = plane->num_rows > needs.vectors ? plane->num_rows : needs.vectors;
            needs.group = plane->num_tokens > needs.group ? plane->num_tokens : needs.group;
        }
        needs.symbols = symbols > needs.symbols ? symbols : needs.symbols;
    }
    return needs;
}

static inline uint64_t kv_ecsq_scratch_bytes(const kv_ecsq *ecsq)
{
    const kv_ecsq_needs needs = ecsq->needs;
    return 64 * 9 + needs.symbols * (1 + 2 + 2) + needs.symbols / KV_ECSQ_LANES * sizeof(kv_ecsq_run)
           + needs.vectors * (4 + 4 + 1) + needs.group * KV_ECSQ_GROUP * 2;
}

static inline void *kv_ecsq_take(uintptr_t *at, uint64_t nbytes)
{
    void *const taken = (void *)*at;
    *at += (nbytes + 63) / 64 * 64;
    return taken;
}

static inline kv_ecsq_encoder kv_ecsq_encoder_of(const kv_ecsq *ecsq, void *scratch)
{
    const kv_ecsq_needs needs = ecsq->needs;
    uintptr_t at = ((uintptr_t)scratch + 63) / 64 * 64;
    kv_ecsq_encoder encoder = {.tables = ecsq->tables, .level = ecsq->level};
    encoder.symbols = kv_ecsq_take(&at, needs.symbols);
    encoder.escapes = kv_ecsq_take(&at, 2 * needs.symbols);
    encoder.words_end = (uint16_t *)kv_ecsq_take(&at, 2 * needs.symbols) + needs.symbols;
    encoder.runs = kv_ecsq_take(&at, needs.symbols / KV_ECSQ_LANES * sizeof(kv_ecsq_run));
    encoder.squares = kv_ecsq_take(&at, 4 * needs.vectors);
    encoder.logarithms = kv_ecsq_take(&at, 4 * needs.vectors);
    encoder.gains = kv_ecsq_take(&at, needs.vectors);
    encoder.group = kv_ecsq_take(&at, needs.group * KV_ECSQ_GROUP * 2);
    return encoder;
}

/* --- What an encoder decides ------------------------------------------------------------------------------------- */

/* The logarithm to base 2 of a number that is not negative, to 0.008, in units of 2^-16: integers alone, so that every
 * processor decides alike. */
static inline int32_t kv_ecsq_log2(float x)
{
    const uint32_t bits = kv_codec_bits(x), m = (bits & 0x7FFFFF) >> 7;
    return ((int32_t)(bits >> 23) - 127) * 65536 + (int32_t)(m + ((m * (65536 - m) >> 16) * 22512 >> 16));
}

/* The least of the numbers that at least half of them do not exceed. */
static inline int32_t kv_ecsq_median(const int32_t *numbers, uint64_t count)
{
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        uint64_t below = 0;
        for (uint64_t i = 0; i < count; i++)
            below += numbers[i] <= middle;
        if (2 * below >= count)
            high = middle;
        else
            low = middle + 1;
    }
    return (int32_t)low;
}

static inline uint32_t kv_ecsq_clip(int64_t number, uint32_t most)
{
    return number < 0 ? 0 : number > most ? most : (uint32_t)number;
}

/* Sums over the integers of a group. */
typedef struct kv_ecsq_spread {
    float squares, magnitudes;
} kv_ecsq_spread;

/* The class of `count` integers: three sizes an octave, and twice that, one more where few of them are far out. */
static inline uint32_t kv_ecsq_class(kv_ecsq_spread spread, uint64_t count)
{
    if (count == 0)
        return 0;
    const int64_t square = kv_ecsq_log2(spread.squares / (float)count);
    const int64_t magnitude = kv_ecsq_log2(spread.magnitudes / (float)count);
    return 2 * kv_ecsq_clip(((3 * square + 65536) >> 17) + 7, KV_ECSQ_CLASSES / 2 - 1)
           + (2 * magnitude - square < -54397); /* the mean magnitude is below 0.75 of the root of the mean square */
}

/* What of a plane's numbers decides its step. */
typedef struct kv_ecsq_sums {
    double squares, of_means; /* sum of x^2; sum over channels of (sum of x)^2 */
    int64_t cost, cost_of_differences;
    uint32_t any_bits;
} kv_ecsq_sums;

/* The step of a plane. Errors of keys weigh more than those of values. Where keys drift, the deviation within a block is
 * less than that of a longer text, so there is more in it for the step. */
static inline uint32_t kv_ecsq_step(const kv_ecsq_plane *plane, const kv_ecsq_sums *sums, uint32_t level, int drifts)
{
    const double numbers = (double)plane->num_rows * (double)(plane->row_bytes / 2);
    const double mean_square = sums->squares / numbers;
    double variance = mean_square / 16; /* of one token nobody knows */
    if (sums->squares == 0)
        return sums->any_bits & 0x7FFF7FFF ? 0 : 0x3F80;
    if (plane->num_tokens > 1)
        variance = (sums->squares - sums->of_means / plane->num_tokens) / (numbers - numbers / plane->num_tokens);
    if (variance < mean_square / 4096)
        variance = mean_square / 4096;
    const double factor = plane->role == KV_ECSQ_V ? 1.283 : drifts ? 1.03 : 0.821;
    const double step = kv_ecsq_steps[level] * factor * sqrt(variance);
    return (kv_codec_bits((float)step) + 0xFFFF) >> 16;
}

/* The gains of a plane's vectors, from the logarithms of their squares. `drifts`: smaller steps for small vectors
 * alone; else all vectors get steps in proportion to their size. */
static inline void kv_ecsq_gain(const int32_t *logarithms, uint64_t count, int drifts, uint8_t *gains)
{
    if (drifts) {
        const int64_t median = kv_ecsq_median(logarithms, count);
        for (uint64_t i = 0; i < count; i++) {
            const int64_t below = median - logarithms[i];
            const int64_t more = below > 67446 ? 2 * ((below + 32768) >> 16) : 0; /* less than 0.7 of the median */
            gains[i] = (uint8_t)kv_ecsq_clip(KV_ECSQ_NO_GAIN + more, 15);
        }
        return;
    }
    int32_t most = INT32_MIN;
    for (uint64_t i = 0; i < count; i++)
        most = logarithms[i] > most ? logarithms[i] : most;
    int64_t sum = 0, counted = 0;
    for (uint64_t i = 0; i < count; i++)
        if (logarithms[i] > most - 10 * 65536) { /* vectors of nothing have no say */
            sum += logarithms[i];
            counted++;
        }
    const int64_t mean = sum / counted;
    for (uint64_t i = 0; i < count; i++)
        gains[i] = (uint8_t)kv_ecsq_clip(KV_ECSQ_NO_GAIN - ((2 * (logarithms[i] - mean) + 32768) >> 16), 15);
}

#endif
