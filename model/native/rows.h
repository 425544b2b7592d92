// A matrix of activations, quantised: int8 in groups of 32 inputs, one scale a group.
//
// x ~ scale * q. Sums of products of int8 are exact, so a row's result depends on nothing beside it.
#pragma once
#include "vector.h"

namespace rivulet {

constexpr int kGroup = 32;

struct QuantisedRows {
    int8_t* values;  // [rows * planes][inputs]
    float* scales;   // [rows * planes][groups]
    float* sums;     // [rows * planes][groups]: scale times the sum of the values, for the weights' minimum
    int32_t inputs;
    int32_t planes;  // 2: what one row of int8 leaves over stands in the next, and a product adds the two

    int groups() const { return inputs / kGroup; }
    int8_t* row(int r) const { return values + int64_t(r) * inputs; }
    float* row_scales(int r) const { return scales + int64_t(r) * groups(); }
    float* row_sums(int r) const { return sums + int64_t(r) * groups(); }
};

// Quantise one group of a row.
inline void quantise_group(Floats a, Floats b, const QuantisedRows& out, int row, int group) {
    const float largest = max(max(abs(a), abs(b)));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const float scale = largest / 127.0f;
    int8_t* q = out.row(row) + group * kGroup;
    store_int8(a * Floats::all(inverse), q);
    store_int8(b * Floats::all(inverse), q + 16);
    int total = 0;
    for (int i = 0; i < kGroup; i++) total += q[i];
    out.row_scales(row)[group] = scale;
    out.row_sums(row)[group] = scale * float(total);
}

// Quantise one group of a row in all planes.
inline void quantise_planes(Floats a, Floats b, const QuantisedRows& out, int row, int group) {
    for (int plane = row * out.planes;; plane++) {
        quantise_group(a, b, out, plane, group);
        if (plane + 1 == (row + 1) * out.planes) return;
        const int8_t* q = out.row(plane) + group * kGroup;
        const Floats scale = Floats::all(out.row_scales(plane)[group]);
        a = a - Floats::load_int8(q) * scale;
        b = b - Floats::load_int8(q + 16) * scale;
    }
}

}  // namespace rivulet
