// Sixteen lanes of AVX2, FMA and F16C, in two registers; a part of vector.h.
#pragma once
#include "scalar.h"

namespace rivulet {

// See vector_avx512.h.
constexpr int row_block(int) { return 3; }
#if defined(RIVULET_TILES)
constexpr int kPanelBlock = 2;  // as tiles take them
#else
constexpr int kPanelBlock = 1;
#endif
constexpr int kFloatRowBlock = 2;
constexpr int kBlocksAtOnce = 2;
constexpr int kRowsTogether = 1;
constexpr int kStretchBlocks = 16;
constexpr int kAttentionSums = 6;

struct Floats {
    __m256 a, b;
    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Floats load_fp16(const fp16* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
    }
    static Floats load_int8(const int8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
    }
    static Floats load_bf16(const bf16* p) {
        auto half = [](const bf16* x) {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
        };
        return {half(p), half(p + 8)};
    }
    void store(float* p) const { _mm256_storeu_ps(p, a), _mm256_storeu_ps(p + 8, b); }
};
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats abs(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline float sum(Floats x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float max(Floats x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline Floats only(Floats x, int start, int end, float other) {
    alignas(32) float lanes[16];
    x.store(lanes);
    for (int i = 0; i < start; i++) lanes[i] = other;
    for (int i = end; i < 16; i++) lanes[i] = other;
    return Floats::load(lanes);
}
inline Floats select_negative(Floats x, Floats negative, Floats other) {
    return {_mm256_blendv_ps(other.a, negative.a, x.a), _mm256_blendv_ps(other.b, negative.b, x.b)};
}
inline Floats round(Floats x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline Floats scale_by_power_of_2(Floats x, Floats n) {  // for exponents that stay normal
    auto power = [](__m256 e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(e), _mm256_set1_epi32(127)), 23));
    };
    return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))};
}
inline __m256i to_int8(Floats x, Floats y) {
    const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(y.a), _mm256_cvtps_epi32(y.b));
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline __m256i sums_of_four(__m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), x), _mm256_set1_epi16(1));
}
inline __m256i bf16_bits(__m256 x) {  // in the upper halves, as to_bf16; what is below them stays
    const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
}
inline void store_bf16(Floats x, bf16* p) {
    const __m256i a = _mm256_srli_epi32(bf16_bits(x.a), 16), b = _mm256_srli_epi32(bf16_bits(x.b), 16);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8));
}
inline Floats rounded_to_bf16(Floats x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000)));
    return {_mm256_and_ps(_mm256_castsi256_ps(bf16_bits(x.a)), mask), _mm256_and_ps(_mm256_castsi256_ps(bf16_bits(x.b)), mask)};
}

struct Ints {
    __m256i a, b;
    static Ints zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Ints load(const int32_t* p) {
        return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
    }
    static Ints bits_of(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
    Floats floats() const { return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)}; }
    Floats bits_as_floats() const { return {_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)}; }
};
inline Ints joined(Ints high, Ints low) {
    return {_mm256_add_epi32(_mm256_slli_epi32(high.a, 8), low.a), _mm256_add_epi32(_mm256_slli_epi32(high.b, 8), low.b)};
}
struct Bytes {
    __m256i a, b;
    static Bytes load(const uint8_t* p) {
        return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
    }
    void store(uint8_t* p) const {
        _mm256_storeu_si256((__m256i*)p, a), _mm256_storeu_si256((__m256i*)(p + 32), b);
    }
    Bytes low_nibbles() const {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)};
    }
    Bytes high_nibbles() const {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(_mm256_srli_epi16(a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
    }
};
// The same four bytes in each lane.
inline __m256i four_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
// a + b in its turn. A compiler that may change the order of a sum's terms multiplies first and adds later, for which there
// are not registers enough.
inline __m256i add_words(__m256i a, __m256i b) {
    a = _mm256_add_epi16(a, b);
    asm("" : "+x"(a));
    return a;
}
inline __m256i add_ints(__m256i a, __m256i b) {
    a = _mm256_add_epi32(a, b);
    asm("" : "+x"(a));
    return a;
}
// Half a lane has room for 16 products of 4 bits with 8, 15 * 128 each at most: those of a group need no more.
struct NibbleSums {
    __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
    void add(Bytes w, __m256i x) {
        a = add_words(a, _mm256_maddubs_epi16(w.a, x));
        b = add_words(b, _mm256_maddubs_epi16(w.b, x));
    }
    Ints ints() const {
        const __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)};
    }
};
// Exact sums over 32 inputs of products of unsigned weights, of 4 or 8 bits, with signed bytes.
template <int Bits>
struct ByteSums {
    static constexpr bool kCanBeOffset = false;
    NibbleSums low, high;  // of 8 bits each half apart: their products would not fit
    // Add the products of each lane's 4 weights with inputs i to i + 3 of a row.
    void add(Bytes w, const int8_t* row, int64_t i) {
        const __m256i all = four_bytes(row + i);
        low.add(Bits == 4 ? w : w.low_nibbles(), all);
        if constexpr (Bits == 8) high.add(w.high_nibbles(), all);
    }
    Ints ints() const {
        if constexpr (Bits == 4) return low.ints();
        const Ints h = high.ints(), l = low.ints();
        return {_mm256_add_epi32(_mm256_slli_epi32(h.a, 4), l.a), _mm256_add_epi32(_mm256_slli_epi32(h.b, 4), l.b)};
    }
};
#if defined(RIVULET_MODEL_OF_TILES)  // tiles take bytes
constexpr bool kWords = false;
#else
// Numbers of 16 bits lie as words: one multiplication of words does what four of bytes with nibbles would.
constexpr bool kWords = true;
#endif
// Store a group of 256 * high + low, of four the even ones first, as WordSums takes them.
inline void store_words(const int8_t* high, const int8_t* low, int8_t* p) {
    for (int i = 0; i < 32; i += 16) {
        const auto words = [&](const int8_t* x) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(x + i))); };
        const __m256i joined = _mm256_add_epi16(_mm256_slli_epi16(words(high), 8), words(low));
        const __m256i exchanged = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(joined, 0xd8), 0xd8);
        _mm256_storeu_si256((__m256i*)(p + 2 * i), exchanged);
    }
}
// Exact sums over 32 inputs of products of unsigned weights of 8 bits with such words.
struct WordSums {
    static constexpr bool kCanBeOffset = false;
    __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
    void add(Bytes w, const int8_t* row, int64_t i) {
        const __m256i even = four_bytes(row + 2 * i), odd = four_bytes(row + 2 * i + 4), mask = _mm256_set1_epi16(255);
        a = add_ints(a, _mm256_madd_epi16(_mm256_and_si256(w.a, mask), even));
        b = add_ints(b, _mm256_madd_epi16(_mm256_and_si256(w.b, mask), even));
        a = add_ints(a, _mm256_madd_epi16(_mm256_srli_epi16(w.a, 8), odd));
        b = add_ints(b, _mm256_madd_epi16(_mm256_srli_epi16(w.b, 8), odd));
    }
    Ints ints() const { return {a, b}; }
};
struct Words {
    __m256i a, b;
    static Words load(const bf16* p) {
        return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
    }
    static Words all(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
    Floats lower_as_floats() const {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    }
    Floats upper_as_floats() const {
        const __m256i mask = _mm256_set1_epi32(int(0xffff0000));
        return {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
    }
};

}  // namespace rivulet
