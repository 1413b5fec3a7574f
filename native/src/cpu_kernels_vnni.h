// One column times a Q4_K matrix with AVX512-VNNI, for single tokens: ggml's product of two rows has 256-bit vectors and is
// slower than the memory. The weights stay as they are in the file.

// As ggml lays it out: weight 32 j + i is d * scale[j] * q - dmin * min[j]
typedef struct q4_k_block {
    ggml_fp16_t d, dmin;
    uint8_t     scales[12]; // eight scales and eight mins of 6 bits
    uint8_t     q[128];     // low halves: weights 64 j + i, high halves: 64 j + 32 + i
} q4_k_block;

enum {
    Q4_K_WEIGHTS   = 256,
    Q4_K_MAX_INPUT = 32768,
};

// 256 values of the column
typedef struct q8_column {
    int8_t  q[Q4_K_WEIGHTS]; // by 32: 0, 2, 1, 3, 4, 6, 5, 7, as the halves of the weights come
    int16_t sums[16];        // from 8 on, of each 32 values
    float   d;
} __attribute__((aligned(64))) q8_column;

#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni,fma,f16c")))

static bool has_vnni(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}

// Rounds to 8 bits
TARGET_VNNI static void quantize_column(const float * x, int64_t n, q8_column * out) {
    static const int place[8] = { 0, 2, 1, 3, 4, 6, 5, 7 };
    for (; n > 0; n -= Q4_K_WEIGHTS, x += Q4_K_WEIGHTS, out++) {
        __m512 most = _mm512_setzero_ps();
        for (int i = 0; i < Q4_K_WEIGHTS; i += 16) {
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
        }
        const float  largest = _mm512_reduce_max_ps(most);
        const __m512 factor  = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
        out->d = largest / 127.0f;
        memset(out->sums, 0, sizeof(out->sums));
        for (int j = 0; j < 8; j++) {
            const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(factor, _mm512_loadu_ps(x + 32 * j)));
            const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(factor, _mm512_loadu_ps(x + 32 * j + 16)));
            int8_t *      q = out->q + 32 * place[j];
            _mm_storeu_si128((__m128i *) q, _mm512_cvtsepi32_epi8(a));
            _mm_storeu_si128((__m128i *) (q + 16), _mm512_cvtsepi32_epi8(b));
            out->sums[8 + j] = (int16_t) _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
        }
    }
}

// Eight scales, then eight mins
TARGET_VNNI static inline __m256i unpack_scales(const uint8_t * packed) {
    uint32_t u[3];
    memcpy(u, packed, sizeof(u));
    const uint32_t a = u[0] & 0x3f3f3f3f, b = (u[2] & 0x0f0f0f0f) | (u[0] >> 6 & 0x03030303) << 4;
    const uint32_t c = u[1] & 0x3f3f3f3f, d = (u[2] >> 4 & 0x0f0f0f0f) | (u[1] >> 6 & 0x03030303) << 4;
    return _mm256_cvtepu8_epi16(_mm_set_epi32((int) d, (int) c, (int) b, (int) a));
}

TARGET_VNNI static float dot_q4_k(const q4_k_block * w, const q8_column * x, int64_t n) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    __m512i       index[4];
    UNROLL for (int i = 0; i < 4; i++) { // the scales of the two times 32 weights in a vector
        const int16_t first = (int16_t) (4 * (i / 2) + i % 2);
        index[i] = _mm512_inserti64x4(_mm512_set1_epi16(first), _mm256_set1_epi16((int16_t) (first + 2)), 1);
    }
    __m512 sum  = _mm512_setzero_ps();
    __m256 mins = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        const __m256i scales = unpack_scales(w[i].scales);
        const __m512i a = _mm512_loadu_si512(w[i].q), b = _mm512_loadu_si512(w[i].q + 64);
        const __m512i q[4] = {
            _mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16(a, 4), low),
            _mm512_and_si512(b, low), _mm512_and_si512(_mm512_srli_epi16(b, 4), low),
        };
        __m512i block = _mm512_setzero_si512();
        UNROLL for (int j = 0; j < 4; j++) {
            const __m512i products = _mm512_maddubs_epi16(q[j], _mm512_loadu_si512(x[i].q + 64 * j)); // two at most 15 * 127
            block = _mm512_dpwssd_epi32(block, products, _mm512_permutexvar_epi16(index[j], _mm512_castsi256_si512(scales)));
        }
        const __m256i taken = _mm256_madd_epi16(scales, _mm256_load_si256((const __m256i *) x[i].sums));
        const __m128  d     = _mm_mul_ps(_mm_cvtph_ps(_mm_loadu_si32(&w[i].d)), _mm_set1_ps(x[i].d)); // and dmin
        sum  = _mm512_fmadd_ps(_mm512_cvtepi32_ps(block), _mm512_broadcastss_ps(d), sum);
        mins = _mm256_fmadd_ps(_mm256_cvtepi32_ps(taken), _mm256_broadcastss_ps(_mm_movehdup_ps(d)), mins);
    }
    return _mm512_reduce_add_ps(_mm512_sub_ps(sum, _mm512_zextps256_ps512(mins)));
}

// out[first .. end - 1] of W x
TARGET_VNNI static void multiply_column(const struct ggml_tensor * w, const float * x, int64_t first, int64_t end, float * out) {
    q8_column     column[Q4_K_MAX_INPUT / Q4_K_WEIGHTS];
    const int64_t n = w->ne[0] / Q4_K_WEIGHTS;
    quantize_column(x, w->ne[0], column);
    for (int64_t i = first; i < end; i++) {
        out[i] = dot_q4_k((const q4_k_block *) ((const char *) w->data + (size_t) i * w->nb[1]), column, n);
    }
}
