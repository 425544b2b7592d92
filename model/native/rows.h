// A matrix of activations as the products take it in: integers in groups of 32 inputs with one scale a group, for
// weights that are integers, or bfloat16, for weights that are bfloat16; or both, if a model has both.
//
// Integers: x ~ scale * q. Sums of their products are exact, so a row's result depends on nothing beside it. q has 8
// bits, or 16 in two planes: q = 256 * the first + the second. Groups whose numbers are small beside the row's largest have
// nothing in the second plane, and products by vectors of bytes leave it out there. Where the processor multiplies words as fast as two planes
// of bytes (kWords) the planes lie together as words, the middle two of each four exchanged.
#pragma once
#include "winograd.h"

namespace rivulet {

constexpr int kGroup = 32;

inline int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct InputRows {
    int8_t* values;  // [rows][planes][inputs], or null
    float* scales;   // [rows][groups]
    float* sums;     // [rows][groups]: scale times the sum of the values, for the weights' minimum
    int32_t* parts;  // [rows][groups]: what a row brings into sums of pairs, where there are any (winograd.h)
    bf16* halves;    // [rows][planes][inputs], or null
    int32_t inputs;
    int32_t planes;  // 1 or 2; what the first leaves over stands in the second

    int groups() const { return inputs / kGroup; }
    int8_t* row(int r) const { return values + int64_t(r) * planes * inputs; }
    float* row_scales(int r) const { return scales + int64_t(r) * groups(); }
    float* row_sums(int r) const { return sums + int64_t(r) * groups(); }
    int32_t* row_parts(int r) const { return parts + int64_t(r) * groups(); }
    bf16* row_halves(int r) const { return halves + int64_t(r) * planes * inputs; }
};

// Whether a group has nothing in a plane.
inline bool all_zero(const int8_t* group) {
    const __m256i values = _mm256_loadu_si256((const __m256i*)group);
    return _mm256_testz_si256(values, values);
}

// Groups of a row in two planes have 16 bits if their largest number is at least so much of the row's largest: the others'
// error with 8 bits is small beside it.
constexpr float kLeastShareOf16Bits = 0.25f;

// Write a group of a row as integers, in one plane if its largest number is below `least`.
inline void write_integers(Floats a, Floats b, const InputRows& out, int row, int group, float least) {
    const float largest = max(max(abs(a), abs(b)));
    const float inverse = largest > 0 ? kLargestByte / largest : 0.0f;
    float scale = largest / kLargestByte;
    int8_t* q = out.row(row) + group * kGroup * (kWords ? out.planes : 1);
    const __m256i bytes = to_int8(a * Floats::all(inverse), b * Floats::all(inverse));
    const GroupSums sums = sums_of(bytes);
    int total = sums.total;
    if (out.planes == 1) {
        _mm256_storeu_si256((__m256i*)q, bytes);
        out.row_parts(row)[group] = sums.part;
    } else {
        alignas(32) int8_t high[kGroup], low[kGroup];
        _mm256_store_si256((__m256i*)high, bytes);
        // Half a step at most is left: up to 128 of its 256th parts, of which a byte holds 127.
        const float inverse_of_rest = largest < least ? 0.0f : 256.0f * inverse;
        const auto rest = [&](Floats x, const int8_t* p) {
            x = x - Floats::load_int8(p) * Floats::all(scale);
            return min(x * Floats::all(inverse_of_rest), Floats::all(127.0f));
        };
        const __m256i rests = to_int8(rest(a, high), rest(b, high + kLanes));
        _mm256_store_si256((__m256i*)low, rests);
        total = 256 * total + sums_of(rests).total;
        scale *= 1 / 256.0f;
        if constexpr (kWords) {
            store_words(high, low, q);
        } else {
            std::memcpy(q, high, kGroup);
            std::memcpy(q + out.inputs, low, kGroup);
        }
    }
    out.row_scales(row)[group] = scale;
    out.row_sums(row)[group] = scale * float(total);
}

// The same as bfloat16.
inline void write_halves(Floats a, Floats b, const InputRows& out, int row, int group) {
    bf16* x = out.row_halves(row) + group * kGroup;
    store_bf16(a, x);
    store_bf16(b, x + kLanes);
    if (out.planes == 2) {
        store_bf16(a - Floats::load_bf16(x), x + out.inputs);
        store_bf16(b - Floats::load_bf16(x + kLanes), x + out.inputs + kLanes);
    }
}

// Write one group of a row, in each form that is wanted.
inline void write_group(Floats a, Floats b, const InputRows& out, int row, int group, float least_of_16_bits = 0) {
    if (out.values) write_integers(a, b, out, row, group, least_of_16_bits);
    if (out.halves) write_halves(a, b, out, row, group);
}

}  // namespace rivulet
