// A few columns times a Q4_K matrix with AVX512-VNNI, for single tokens and short questions: ggml's product of two rows has
// 256-bit vectors and is slower than the memory. The weights stay as they are in the file.

// As ggml lays it out: weight 32 j + i is d * scale[j] * q - dmin * min[j]
typedef struct q4_k_block {
    ggml_fp16_t d, dmin;
    uint8_t     scales[12]; // eight scales and eight mins of 6 bits
    uint8_t     q[128];     // low halves: weights 64 j + i, high halves: 64 j + 32 + i
} q4_k_block;

enum {
    Q4_K_WEIGHTS = 256,
    Q4_K_ROWS    = 16, // that pass by some columns together: they stay in the second-level cache, the columns in the first
};

// 256 values of a column
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

// out[j * stride] = row w times column j of `columns`, each of n blocks
TARGET_VNNI static inline __attribute__((always_inline)) void dot_q4_k(const q4_k_block * w, const q8_column * x, int64_t n, float * out,
                                                                       int64_t stride, const int columns) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    __m512i       index[4];
    UNROLL for (int i = 0; i < 4; i++) { // the scales of the two times 32 weights in a vector
        const int16_t first = (int16_t) (4 * (i / 2) + i % 2);
        index[i] = _mm512_inserti64x4(_mm512_set1_epi16(first), _mm256_set1_epi16((int16_t) (first + 2)), 1);
    }
    __m512 sum[4];
    __m256 mins[4];
    UNROLL for (int c = 0; c < columns; c++) {
        sum[c]  = _mm512_setzero_ps();
        mins[c] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n; i++) {
        const __m256i packed = unpack_scales(w[i].scales);
        const __m512i a = _mm512_loadu_si512(w[i].q), b = _mm512_loadu_si512(w[i].q + 64);
        const __m512i q[4] = {
            _mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16(a, 4), low),
            _mm512_and_si512(b, low), _mm512_and_si512(_mm512_srli_epi16(b, 4), low),
        };
        __m512i scales[4];
        UNROLL for (int j = 0; j < 4; j++) {
            scales[j] = _mm512_permutexvar_epi16(index[j], _mm512_castsi256_si512(packed));
        }
        int32_t both; // d and dmin
        memcpy(&both, &w[i], sizeof(both));
        const __m128 factors = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
        UNROLL for (int c = 0; c < columns; c++) {
            const q8_column * column = &x[c * n + i];
            __m512i           block  = _mm512_setzero_si512();
            UNROLL for (int j = 0; j < 4; j++) {
                const __m512i products = _mm512_maddubs_epi16(q[j], _mm512_loadu_si512(column->q + 64 * j)); // two at most 15 * 127
                block = _mm512_dpwssd_epi32(block, products, scales[j]);
            }
            const __m256i taken = _mm256_madd_epi16(packed, _mm256_loadu_si256((const __m256i *) column->sums));
            const __m128  d     = _mm_mul_ps(factors, _mm_set1_ps(column->d));
            sum[c]  = _mm512_fmadd_ps(_mm512_cvtepi32_ps(block), _mm512_broadcastss_ps(d), sum[c]);
            mins[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(taken), _mm256_broadcastss_ps(_mm_movehdup_ps(d)), mins[c]);
        }
    }
    UNROLL for (int c = 0; c < columns; c++) {
        out[c * stride] = _mm512_reduce_add_ps(_mm512_sub_ps(sum[c], _mm512_zextps256_ps512(mins[c])));
    }
}

// Rows first .. end - 1 of W x, for n_columns columns; out in columns of `stride`
TARGET_VNNI static void multiply_columns(const struct ggml_tensor * w, const q8_column * x, int64_t n_columns, int64_t first, int64_t end,
                                         float * out, int64_t stride) {
    const int64_t n = w->ne[0] / Q4_K_WEIGHTS;
    for (int64_t at = first; at < end; at += Q4_K_ROWS) {
        const int64_t last = at + Q4_K_ROWS < end ? at + Q4_K_ROWS : end;
        for (int64_t c = 0; c < n_columns;) {
            const int64_t     left = n_columns - c;
            const q8_column * some = x + c * n;
            for (int64_t i = at; i < last; i++) {
                const q4_k_block * row = (const q4_k_block *) ((const char *) w->data + (size_t) i * w->nb[1]);
                if (left >= 4) {
                    dot_q4_k(row, some, n, out + c * stride + i, stride, 4);
                } else if (left >= 2) {
                    dot_q4_k(row, some, n, out + c * stride + i, stride, 2);
                } else {
                    dot_q4_k(row, some, n, out + c * stride + i, stride, 1);
                }
            }
            c += left >= 4 ? 4 : left >= 2 ? 2 : 1;
        }
    }
}
