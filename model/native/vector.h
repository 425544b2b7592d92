// Sixteen lanes at a time, the same for every variant: one AVX-512 register, or two of AVX2.
//
// The kernels are written once against these types; a build with other -m flags is another variant.
// Operations round as IEEE says, so that variants differ by what they fuse, never by how they round.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace rivulet {

using bf16 = uint16_t;
using fp16 = uint16_t;

constexpr int kLanes = 16;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Begin to fetch a cache line; any address will do.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// The same past the first-level cache, for what is wanted later.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Round to nearest, ties to even; what comes in is finite.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

// How many rows by how many panels a linear kernel keeps in registers.
constexpr int kRowBlock = 5, kPanelBlock = 2;
// Of how many blocks of keys attention keeps the scores in registers: their sums hide each other's latency.
constexpr int kBlocksAtOnce = 4;
// And of how many rows of a sequence together.
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
// Round to integers and store them as bytes; their sum.
inline int store_int8(Floats a, Floats b, int8_t* p) {
    const __m512i x = _mm512_cvtps_epi32(a.v), y = _mm512_cvtps_epi32(b.v);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
    _mm_storeu_si128((__m128i*)(p + 16), _mm512_cvtepi32_epi8(y));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(x, y));
}
inline void store_bf16(Floats a, bf16* p) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
#else  // as to_bf16
    const __m512i bits = _mm512_castps_si512(a.v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

struct Ints {
    __m512i v;
    static Ints zero() { return {_mm512_setzero_si512()}; }
    static Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
    static Ints bits_of(Floats x) { return {_mm512_castps_si512(x.v)}; }
    Floats floats() const { return {_mm512_cvtepi32_ps(v)}; }
    Floats bits_as_floats() const { return {_mm512_castsi512_ps(v)}; }
};
// 256 * high + low.
inline Ints joined(Ints high, Ints low) { return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 8), low.v)}; }
// 16 lanes of 4 unsigned bytes.
struct Bytes {
    __m512i v;
    static Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
    Bytes low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
    Bytes high_nibbles() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
};
// Exact sums over 32 inputs of products of unsigned weights, of 4 or 8 bits, with signed bytes; they begin at the bits of
// a float (see OffsetFactors), or at zero.
template <int Bits>
struct Sums {
    static constexpr bool kCanBeOffset = true;
    Ints sum;
    explicit Sums(Ints start = Ints::zero()) : sum(start) {}
    // Add the products of each lane's 4 weights with the same 4 bytes.
    void add(Bytes w, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        sum = {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))};
    }
    Ints ints() const { return sum; }
};
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

#else  // AVX2, FMA, F16C

constexpr int kRowBlock = 2, kPanelBlock = 1;
constexpr int kBlocksAtOnce = 1;
constexpr int kRowsTogether = 1;

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
inline int store_int8(Floats x, Floats y, int8_t* p) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m256i c = _mm256_cvtps_epi32(y.a), d = _mm256_cvtps_epi32(y.b);
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __m256i four = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline void store_bf16(Floats x, bf16* p) {
    alignas(32) float lanes[16];
    x.store(lanes);
    for (int i = 0; i < 16; i++) p[i] = to_bf16(lanes[i]);
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
// Half a lane has room for 16 products of 4 bits with 8, 15 * 128 each at most: those of a group need no more.
struct NibbleSums {
    __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
    void add(Bytes w, __m256i x) {
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.a, x));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.b, x));
    }
    Ints ints() const {
        const __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)};
    }
};
// Exact sums over 32 inputs of products of unsigned weights, of 4 or 8 bits, with signed bytes.
template <int Bits>
struct Sums {
    static constexpr bool kCanBeOffset = false;
    NibbleSums low, high;  // of 8 bits each half apart: their products would not fit
    explicit Sums(Ints = Ints::zero()) {}
    // Add the products of each lane's 4 weights with the same 4 bytes.
    void add(Bytes w, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        const __m256i all = _mm256_set1_epi32(four);
        low.add(Bits == 4 ? w : w.low_nibbles(), all);
        if constexpr (Bits == 8) high.add(w.high_nibbles(), all);
    }
    Ints ints() const {
        if constexpr (Bits == 4) return low.ints();
        const Ints h = high.ints(), l = low.ints();
        return {_mm256_add_epi32(_mm256_slli_epi32(h.a, 4), l.a), _mm256_add_epi32(_mm256_slli_epi32(h.b, 4), l.b)};
    }
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

#endif

// 16 lanes of a pair of bfloat16, and the products of such pairs added to a sum.
#if defined(__AVX512BF16__)

struct Pairs {
    __m512i v;
    static Pairs load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
    static Pairs all(const bf16* p) {  // the same pair in each lane
        uint32_t two;
        std::memcpy(&two, p, 4);
        return {_mm512_set1_epi32(two)};
    }
    Pairs first() const { return {_mm512_and_si512(v, _mm512_set1_epi32(0xffff))}; }  // the other of each is zero
};
inline Floats dot(Floats sum, Pairs x, Pairs y) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)y.v)}; }

#else

struct Pairs {
    Floats even, odd;
    static Pairs load(const bf16* p) { return of(Words::load(p)); }
    static Pairs all(const bf16* p) {
        uint32_t two;
        std::memcpy(&two, p, 4);
        return of(Words::all(two));
    }
    static Pairs of(Words both) { return {both.lower_as_floats(), both.upper_as_floats()}; }
    Pairs first() const { return {even, Floats::zero()}; }
};
inline Floats dot(Floats sum, Pairs x, Pairs y) { return fma(x.even, y.even, fma(x.odd, y.odd, sum)); }

#endif

// e^x for x <= 0: 2^n times a polynomial on [-1/2, 1/2]; relative error below 2^-21.
inline Floats exp(Floats x) {
    x = max(x, Floats::all(-87.0f));
    const Floats t = x * Floats::all(1.44269504f);
    const Floats n = round(t);
    const Floats f = t - n;
    Floats p = Floats::all(0.00015403530f);
    p = fma(p, f, Floats::all(0.0013333558f));
    p = fma(p, f, Floats::all(0.0096181291f));
    p = fma(p, f, Floats::all(0.0555041087f));
    p = fma(p, f, Floats::all(0.2402265070f));
    p = fma(p, f, Floats::all(0.6931471806f));
    p = fma(p, f, Floats::all(1.0f));
    return scale_by_power_of_2(p, n);
}

// 1 / sqrt(mean(x^2) + epsilon) of `size` numbers: what an RMS norm multiplies with (arXiv:1910.07467).
inline float rms_factor(const float* x, int size, float epsilon) {
    Floats squares = Floats::zero();
    for (int i = 0; i < size; i += kLanes) {
        const Floats v = Floats::load(x + i);
        squares = fma(v, v, squares);
    }
    return 1.0f / std::sqrt(sum(squares) / float(size) + epsilon);
}

}  // namespace rivulet
