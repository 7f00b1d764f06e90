/* The step for x86-64 processors with AVX-512 and VNNI. */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) FAST
#define FOR_THIS(name) name##_avx512
#define TILE 6     /* 24 sums and 4 parts of the block in 32 registers */
#define AHEAD 2048 /* bytes that are asked for before they are needed */

typedef __m512 Floats;
typedef __m512i Wholes;

#define some_of(count) ((__mmask16)((1u << (count)) - 1))

INLINE Floats zero16(void) { return _mm512_setzero_ps(); }
INLINE Floats all16(float x) { return _mm512_set1_ps(x); }
INLINE Floats load16(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store16(float *to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE Floats load_first16(int64_t count, const float *x) { return _mm512_maskz_loadu_ps(some_of(count), x); }
INLINE void store_first16(int64_t count, float *to, Floats x) { _mm512_mask_storeu_ps(to, some_of(count), x); }
INLINE Floats first16(int64_t count, Floats x) { return _mm512_maskz_mov_ps(some_of(count), x); } /* else zeros */
INLINE Floats add16(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub16(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul16(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats div16(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats fma16(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats less16(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
INLINE Floats min16(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats max16(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats abs16(Floats x) { return _mm512_abs_ps(x); }
INLINE Floats round16(Floats x) { return _mm512_roundscale_ps(x, 8); }
INLINE Floats scale16(Floats x, Floats n) { return _mm512_scalef_ps(x, n); } /* x 2^n, n whole */
INLINE Floats turned16(Floats x, Floats sign) {                              /* -x where the other is negative */
    __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(sign));
    return _mm512_mask_sub_ps(x, negative, _mm512_setzero_ps(), x);
}
INLINE float sum_of16(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE float largest16(Floats x) { return _mm512_reduce_max_ps(x); }

INLINE Wholes no_whole16(void) { return _mm512_setzero_si512(); }
INLINE Wholes whole16(Floats x) { return _mm512_cvtps_epi32(x); }
INLINE Wholes add_whole16(Wholes a, Wholes b) { return _mm512_add_epi32(a, b); }
INLINE int32_t sum_of_whole16(Wholes x) { return _mm512_reduce_add_epi32(x); }
INLINE void store_whole16(int8_t *to, Wholes x) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(x)); }
INLINE Floats widened_whole16(Wholes x) { return _mm512_cvtepi32_ps(x); }
INLINE Floats widened16(const int8_t *x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
}

/* sums[r][k]: row r of x times outputs 16 k to 16 k + 15 of the block w, given the rows' own sums. */
INLINE void add_products(const uint8_t *w, int64_t quads, const int8_t *x, int64_t stride, const int32_t *own,
                         const int rows, Wholes sums[][4]) {
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) sums[r][k] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; q++, w += 4 * 64) {
        __m512i part[4];
        for (int k = 0; k < 4; k++) {
            part[k] = _mm512_loadu_si512(w + 64 * k);
            _mm_prefetch((const char *)w + AHEAD + 64 * k, _MM_HINT_T0);
        }
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride + 4 * q, 4);
            __m512i given = _mm512_set1_epi32(four);
            for (int k = 0; k < 4; k++) sums[r][k] = _mm512_dpbusd_epi32(sums[r][k], part[k], given);
        }
    }
    for (int r = 0; r < rows; r++) /* weights are 128 too large */
        for (int k = 0; k < 4; k++) sums[r][k] = _mm512_sub_epi32(sums[r][k], _mm512_set1_epi32(128 * own[r]));
}

#include "_native_step.h"

#endif
