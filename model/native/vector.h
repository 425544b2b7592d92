// Sixteen lanes at a time, the same for every variant: one AVX-512 register, or two of AVX2.
//
// The kernels are written once against these types; a build with other -m flags is another variant.
// Operations round as IEEE says, so that variants differ by what they fuse, never by how they round.
#pragma once
#include <cmath>

#if defined(__AVX512F__)
#include "vector_avx512.h"
#else
#include "vector_avx2.h"
#endif

namespace rivulet {

// Sums (see ByteSums) with numbers of 16 bits in two planes of bytes, the second of them `inputs` behind the first.
template <int Bits>
struct PlaneSums {
    static constexpr bool kCanBeOffset = false;  // joined, they take more bits than an offset leaves
    ByteSums<Bits> high, low;
    void add(Bytes w, const int8_t* row, int64_t i) { high.add(w, row, i); }
    void add_second(Bytes w, const int8_t* row, int64_t i, int64_t inputs) { low.add(w, row + inputs, i); }
    Ints ints() const { return joined(high.ints(), low.ints()); }
};
// The same with words, and how a group of them is stored, where there are any (kWords).
struct WordSums;
void store_words(const int8_t* high, const int8_t* low, int8_t* p);

// 16 lanes of a pair of bfloat16, and the products of such pairs added to a sum. What is multiplied with all lanes alike is
// kept as `Element`s: bfloat16 where an instruction takes pairs of them, else floats of the same value, unpacked once.
// Processors with AMX have the instruction, too, but in the time of one they multiply four vectors of floats.
#if defined(__AVX512BF16__) && !defined(RIVULET_TILES)

struct Pairs {
    using Element = bf16;
    __m512i v;
    static Pairs load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
    static Pairs all(const bf16* p) {  // the same pair in each lane
        uint32_t two;
        std::memcpy(&two, p, 4);
        return {_mm512_set1_epi32(two)};
    }
    static void store(Floats x, Element* p) { store_bf16(x, p); }
    Pairs first() const { return {_mm512_and_si512(v, _mm512_set1_epi32(0xffff))}; }  // the other of each is zero
};
inline Floats dot(Floats sum, Pairs x, Pairs y) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)y.v)}; }

#else

struct Pairs {
    using Element = float;
    Floats even, odd;
    static Pairs load(const bf16* p) { return of(Words::load(p)); }
    static Pairs all(const bf16* p) {
        uint32_t two;
        std::memcpy(&two, p, 4);
        return of(Words::all(two));
    }
    static Pairs all(const Element* p) { return {Floats::all(p[0]), Floats::all(p[1])}; }
    static Pairs of(Words both) { return {both.lower_as_floats(), both.upper_as_floats()}; }
    static void store(Floats x, Element* p) { rounded_to_bf16(x).store(p); }
    Pairs first() const { return {even, Floats::zero()}; }
};
inline Floats dot(Floats sum, Pairs x, Pairs y) { return fma(x.even, y.even, fma(x.odd, y.odd, sum)); }

#endif

// A sum of such products, which ends part by part.
struct PairSum {
    Floats total = Floats::zero();
#if defined(RIVULET_TILES)
    // In the order of AMX's tiles (tiles.h), so that both give the same bits.
    Floats even = Floats::zero(), odd = Floats::zero();
    void add(Pairs x, Pairs y) {
        even = fma(x.even, y.even, even);
        odd = fma(x.odd, y.odd, odd);
    }
    void end_part() {
        total = total + (even + odd);
        even = odd = Floats::zero();
    }
#else
    void add(Pairs x, Pairs y) { total = dot(total, x, y); }
    void end_part() {}
#endif
};

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
