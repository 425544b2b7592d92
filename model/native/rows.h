// A matrix of activations as the products take it in: int8 in groups of 32 inputs with one scale a group, for
// weights that are integers, or bfloat16, for weights that are bfloat16; or both, if a model has both.
//
// int8: x ~ scale * q. Sums of products of int8 are exact, so a row's result depends on nothing beside it.
#pragma once
#include "vector.h"

namespace rivulet {

constexpr int kGroup = 32;

struct InputRows {
    int8_t* values;  // [rows * planes][inputs], or null
    float* scales;   // [rows * planes][groups]
    float* sums;     // [rows * planes][groups]: scale times the sum of the values, for the weights' minimum
    bf16* halves;    // [rows * planes][inputs], or null
    int32_t inputs;
    int32_t planes;  // 2: what one row's plane leaves over stands in the next, and a product adds the two

    int groups() const { return inputs / kGroup; }
    int8_t* row(int r) const { return values + int64_t(r) * inputs; }
    float* row_scales(int r) const { return scales + int64_t(r) * groups(); }
    float* row_sums(int r) const { return sums + int64_t(r) * groups(); }
    bf16* row_halves(int r) const { return halves + int64_t(r) * inputs; }
};

// Write a group of one plane as int8, and take away from the numbers what it holds.
inline void write_int8(Floats& a, Floats& b, const InputRows& out, int plane, int group) {
    const float largest = max(max(abs(a), abs(b)));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const float scale = largest / 127.0f;
    int8_t* q = out.row(plane) + group * kGroup;
    store_int8(a * Floats::all(inverse), q);
    store_int8(b * Floats::all(inverse), q + 16);
    int total = 0;
    for (int i = 0; i < kGroup; i++) total += q[i];
    out.row_scales(plane)[group] = scale;
    out.row_sums(plane)[group] = scale * float(total);
    a = a - Floats::load_int8(q) * Floats::all(scale);
    b = b - Floats::load_int8(q + 16) * Floats::all(scale);
}

// The same as bfloat16.
inline void write_bf16(Floats& a, Floats& b, const InputRows& out, int plane, int group) {
    bf16* x = out.row_halves(plane) + group * kGroup;
    store_bf16(a, x);
    store_bf16(b, x + 16);
    a = a - Floats::load_bf16(x);
    b = b - Floats::load_bf16(x + 16);
}

// Write one group of a row in all planes, in each form that is wanted.
inline void write_group(Floats a, Floats b, const InputRows& out, int row, int group) {
    Floats rest_a = a, rest_b = b;
    for (int plane = row * out.planes; plane < (row + 1) * out.planes; plane++) {
        if (out.values) write_int8(a, b, out, plane, group);
        if (out.halves) write_bf16(rest_a, rest_b, out, plane, group);
    }
}

}  // namespace rivulet
