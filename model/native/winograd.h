// Winograd's inner product (S. Winograd, "A New Algorithm for Inner Product", IEEE Transactions on Computers C-17, 1968):
// two products by one multiplication,
//   x1 w1 + x2 w2 = (x1 + b) (x2 + a) - (x1 x2 - 8 x1 + 120 x2) - a b,   a = w1 - 8, b = w2 + 120.
//
// The middle is a number of the row alone and a b one of the weights alone: each is computed once. Weights of 4 bits leave
// x1 + b within 0 to 255 and x2 + a within -128 to 127 if inputs stay within -120 to 120 (kLargestByte). The sums are as
// exact as plain ones, so they are the same.
//
// A processor that adds bytes on more units than it multiplies them on gains by it; without AVX-512's byte products
// there is nothing that multiplies sums so large, and tiles multiply where there are tiles.
#pragma once
#include "vector.h"

namespace rivulet {

// The largest quantised activation of 8 bits.
constexpr int kLargestByte = 120;

constexpr int kFirstOffset = -8, kSecondOffset = kLargestByte;

// The sum of a group's 32 activations, and what they bring into the sums of pairs, inputs i and i + 4 of each 8 (without
// RIVULET_WINOGRAD any number: nobody reads it).
struct GroupSums {
    int32_t total, part;
};
inline GroupSums sums_of(__m256i x) {
    const auto exchanged = [](__m256i y) { return _mm256_shuffle_epi32(y, 0xb1); };
    const __m256i fours = sums_of_four(x), eights = _mm256_add_epi32(fours, exchanged(fours));
#if defined(RIVULET_WINOGRAD)
    // x1 + 120 and x2 - 8 in turn, four of each; then their products' sums in the even lanes, and in the odd ones those of x.
    const __m256i both = _mm256_add_epi8(x, _mm256_set1_epi64x(0xf8f8f8f878787878));
    const __m256i products = _mm256_dpbusd_epi32(_mm256_setzero_si256(), both, exchanged(both));
    const __m256i lanes = _mm256_blend_epi32(products, eights, 0xaa);
#else
    const __m256i lanes = eights;
#endif
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    const __m128i sums = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    constexpr int kPairs = 16;
    return {_mm_extract_epi32(sums, 1), kPairs * kFirstOffset * kSecondOffset - _mm_cvtsi128_si32(sums)};
}

}  // namespace rivulet
