/* The step for x86-64 processors with AVX2 and FMA: 16 numbers are two halves. */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define FAST __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) FAST
#define FOR_THIS(name) name##_avx2
#define TILE 4     /* 8 sums, and what goes into one, in 16 registers */
#define AHEAD 2048 /* bytes that are asked for before they are needed */

typedef struct {
    __m256 a, b;
} Floats;
typedef struct {
    __m256i a, b;
} Wholes;

INLINE Floats zero16(void) { return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats all16(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats load16(const float *x) { return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE void store16(float *to, Floats x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
INLINE Floats add16(Floats x, Floats y) { return (Floats){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Floats sub16(Floats x, Floats y) { return (Floats){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Floats mul16(Floats x, Floats y) { return (Floats){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Floats div16(Floats x, Floats y) { return (Floats){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Floats fma16(Floats x, Floats y, Floats z) {
    return (Floats){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats less16(Floats x, Floats y, Floats z) { /* z - x y */
    return (Floats){_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats min16(Floats x, Floats y) { return (Floats){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE Floats max16(Floats x, Floats y) { return (Floats){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Floats abs16(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE Floats round16(Floats x) { return (Floats){_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
INLINE __m256 scale8(__m256 x, __m256 n) { /* the exponent is between those of the smallest and the largest numbers */
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
INLINE Floats scale16(Floats x, Floats n) { return (Floats){scale8(x.a, n.a), scale8(x.b, n.b)}; } /* x 2^n, n whole */
INLINE Floats turned16(Floats x, Floats y) { /* -x where the other is negative */
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_xor_ps(x.a, _mm256_and_ps(sign, y.a)), _mm256_xor_ps(x.b, _mm256_and_ps(sign, y.b))};
}

/* All bits of the first `count` numbers of 8, which may be fewer than none or more than all. */
INLINE __m256i some_of(int64_t count) {
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)count), order);
}
INLINE Floats first16(int64_t count, Floats x) { /* else zeros */
    return (Floats){_mm256_and_ps(_mm256_castsi256_ps(some_of(count)), x.a),
                    _mm256_and_ps(_mm256_castsi256_ps(some_of(count - 8)), x.b)};
}
INLINE Floats load_first16(int64_t count, const float *x) {
    if (count == 16) return load16(x);
    return (Floats){_mm256_maskload_ps(x, some_of(count)), _mm256_maskload_ps(x + 8, some_of(count - 8))};
}
INLINE void store_first16(int64_t count, float *to, Floats x) {
    if (count == 16) {
        store16(to, x);
        return;
    }
    _mm256_maskstore_ps(to, some_of(count), x.a);
    _mm256_maskstore_ps(to + 8, some_of(count - 8), x.b);
}

/* Halves first, and halves of these, as with AVX-512. */
INLINE float sum_of16(Floats x) {
    const __m256 eight = _mm256_add_ps(x.b, x.a);
    const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_movehdup_ps(two));
}
INLINE float largest16(Floats x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE Wholes no_whole16(void) { return (Wholes){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Wholes whole16(Floats x) { return (Wholes){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Wholes add_whole16(Wholes x, Wholes y) {
    return (Wholes){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
INLINE int32_t sum_of_whole16(Wholes x) {
    const __m256i eight = _mm256_add_epi32(x.a, x.b);
    const __m128i four = _mm_add_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE void store_whole16(int8_t *to, Wholes x) {
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8); /* 16 of 16 bits, in order */
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}
INLINE Floats widened_whole16(Wholes x) { return (Floats){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Floats widened16(const int8_t *x) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)x);
    return (Floats){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

/* Products of `rows` rows with 16 `wide` outputs of a block, from output 16 k on, into sums[r][k] and on.

   AVX2 multiplies eight bits without a sign by eight with one and adds pairs in 16 bits. Of a weight without its sign,
   which the other factor is given, a pair is 2 x 127 x 127 at most, and fits. */
INLINE void add_some_products(const uint8_t *w, int64_t quads, const int8_t *x, int64_t stride, const int rows,
                              const int k, const int wide, Wholes sums[][4]) {
    const __m256i one = _mm256_set1_epi16(1), less = _mm256_set1_epi8(-128); /* weights are 128 too large */
    __m256i found[TILE][8];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2 * wide; i++) found[r][i] = _mm256_setzero_si256();
    w += 64 * k;
    for (int64_t q = 0; q < quads; q++, w += 4 * 64) {
        __m256i part[8], size[8];
        for (int i = 0; i < 2 * wide; i++) {
            part[i] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + 32 * i)), less);
            size[i] = _mm256_abs_epi8(part[i]);
            if (i % 2 == 0) _mm_prefetch((const char *)w + AHEAD + 32 * i, _MM_HINT_T0);
        }
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride + 4 * q, 4);
            const __m256i given = _mm256_set1_epi32(four);
            for (int i = 0; i < 2 * wide; i++) {
                const __m256i pairs = _mm256_maddubs_epi16(size[i], _mm256_sign_epi8(given, part[i]));
                found[r][i] = _mm256_add_epi32(found[r][i], _mm256_madd_epi16(pairs, one));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide; i++) sums[r][k + i] = (Wholes){found[r][2 * i], found[r][2 * i + 1]};
}

/* sums[r][k]: row r of x times outputs 16 k to 16 k + 15 of the block w. */
INLINE void add_products(const uint8_t *w, int64_t quads, const int8_t *x, int64_t stride, const int32_t *own,
                         const int rows, Wholes sums[][4]) {
    (void)own;
    if (rows == 1) {
        add_some_products(w, quads, x, stride, rows, 0, 4, sums);
    } else if (rows == 2) {
        add_some_products(w, quads, x, stride, rows, 0, 2, sums);
        add_some_products(w, quads, x, stride, rows, 2, 2, sums);
    } else {
        for (int k = 0; k < 4; k++) add_some_products(w, quads, x, stride, rows, k, 1, sums);
    }
}

#include "_native_step.h"

#endif
