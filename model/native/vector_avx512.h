// Sixteen lanes of AVX-512, with VNNI; a part of vector.h.
#pragma once
#include "scalar.h"

namespace rivulet {

// How many rows, in one plane or two, by how many panels a linear kernel keeps in registers.
constexpr int row_block(int planes) { return 5 / planes; }
constexpr int kPanelBlock = 2;
// Rows whose sums in float32 find room there.
constexpr int kFloatRowBlock = 4;
#if defined(RIVULET_TILES)
// Of how many blocks of keys attention keeps the scores in registers: their sums hide each other's latency.
constexpr int kBlocksAtOnce = 2;
// Blocks whose scores, of several key heads or of sixteen queries, stay in the first-level cache.
constexpr int kStretchBlocks = 16;
// So many sums of attention find room there, beside what they are made of; here each takes three registers.
constexpr int kAttentionSums = 8;
#else
constexpr int kBlocksAtOnce = 4;
constexpr int kStretchBlocks = 32;
constexpr int kAttentionSums = 24;
#endif
// Rows of a sequence that go together.
constexpr int kRowsTogether = 2;

struct Floats {
    __m512 v;
    static Floats zero() { return {_mm512_setzero_ps()}; }
    static Floats all(float x) { return {_mm512_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Floats load_fp16(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
    static Floats load_int8(const int8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
    }
    static Floats load_bf16(const bf16* p) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float max(Floats a) { return _mm512_reduce_max_ps(a.v); }
// Lanes outside of those from `start` to `end` become `other`.
inline Floats only(Floats a, int start, int end, float other) {
    const __mmask16 mask = __mmask16((1u << end) - (1u << start));
    return {_mm512_mask_blend_ps(mask, _mm512_set1_ps(other), a.v)};
}
// `negative` where x < 0, else `other`.
inline Floats select_negative(Floats x, Floats negative, Floats other) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), other.v, negative.v)};
}
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline Floats scale_by_power_of_2(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Rounded to 32 integers of a byte.
inline __m256i to_int8(Floats a, Floats b) {
    const __m128i x = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)), y = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(b.v));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1);
}
// Sums of four bytes each.
inline __m256i sums_of_four(__m256i x) {
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), x);
}
inline __m512i bf16_bits(Floats a) {  // in the upper halves, as to_bf16; what is below them stays
    const __m512i bits = _mm512_castps_si512(a.v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
}
inline void store_bf16(Floats a, bf16* p) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
#else
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16)));
#endif
}
inline Floats rounded_to_bf16(Floats a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(bf16_bits(a), _mm512_set1_epi32(int(0xffff0000))))};
}

struct Ints {
    __m512i v;
    static Ints zero() { return {_mm512_setzero_si512()}; }
    static Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
    static Ints bits_of(Floats x) { return {_mm512_castps_si512(x.v)}; }
    Floats floats() const { return {_mm512_cvtepi32_ps(v)}; }
    Floats bits_as_floats() const { return {_mm512_castsi512_ps(v)}; }
    void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
// 256 * high + low.
inline Ints joined(Ints high, Ints low) { return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 8), low.v)}; }
// 16 lanes of 4 bytes.
struct Bytes {
    __m512i v;
    static Bytes all(int x) { return {_mm512_set1_epi8(char(x))}; }
    static Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    static Bytes four(const int8_t* p) {  // the same in each lane
        int32_t four;
        std::memcpy(&four, p, 4);
        return {_mm512_set1_epi32(four)};
    }
    // In a register: a compiler may rather load it again wherever it is used.
    Bytes kept() const {
        Bytes bytes = *this;
        asm("" : "+v"(bytes.v));
        return bytes;
    }
    void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
    Bytes low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
    Bytes high_nibbles() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
};
inline Bytes operator+(Bytes a, Bytes b) { return {_mm512_add_epi8(a.v, b.v)}; }
// Each lane's sum and the products of its four bytes, unsigned in x and signed in y.
inline Ints dot(Ints sum, Bytes x, Bytes y) { return {_mm512_dpbusd_epi32(sum.v, x.v, y.v)}; }
// Exact sums over 32 inputs of products of unsigned weights, of 4 or 8 bits, with signed bytes; they begin at the bits of
// a float (see OffsetFactors), or at zero.
template <int Bits>
struct ByteSums {
    static constexpr bool kCanBeOffset = true;
    Ints sum = Ints::zero();
    // Add the products of each lane's 4 weights with inputs i to i + 3 of a row.
    void add(Bytes w, const int8_t* row, int64_t i) { sum = dot(sum, w, Bytes::four(row + i)); }
    Ints ints() const { return sum; }
};
// Numbers of 16 bits lie as two planes of bytes: 256 * the first + the second.
constexpr bool kWords = false;
// 16 lanes of 32 bits: two bfloat16, either of which is a float with bits of zero behind it.
struct Words {
    __m512i v;
    static Words load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
    static Words all(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
    Floats lower_as_floats() const { return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))}; }
    Floats upper_as_floats() const {
        return {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))))};
    }
};

}  // namespace rivulet
