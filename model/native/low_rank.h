// Low-rank adapters as work for the crew; see low_rank.cpp.
#pragma once
#include <vector>

#include "pass.h"
#include "rows.h"
#include "threads.h"

namespace rivulet {

// What one adapter adds to some outputs of a product with x: B (A x). Numbers are fp16 in panels of 16 outputs.
struct LowRank {
    const fp16* a;           // [rank / 16][inputs][16]
    const fp16* b;           // [outputs / 16][rank][16]
    int32_t adapter;         // from 1
    int32_t rank;            // a multiple of 16, as the next two
    int32_t first, outputs;  // of the product
};

// The pairs of one product by adapter, each with its place among the inner numbers A x of a row.
struct Adapters {
    Adapters(const LowRank* pairs, int count);
    struct Placed : LowRank {
        int place;
    };
    std::vector<std::vector<Placed>> of;
    int width = 0;  // inner numbers of a row, at most
};

// inner[row] = A x[row], of the rows whose sequence has an adapter.
struct Shrink : Work {
    Shrink(const Pass& pass, InputRows in, Adapters adapters, float* inner);
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const InputRows in;
    const Adapters adapters;
    float* const inner;  // [rows][width]
};

// out[row] += multiplier * (B inner[row]), of the same rows.
struct Expand : Work {
    Expand(const Pass& pass, const float* inner, Adapters adapters, float multiplier, float* out, int outputs);
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const float* const inner;
    const Adapters adapters;
    const float multiplier;
    float* const out;  // [rows][outputs]
    const int outputs;
};

}  // namespace rivulet
