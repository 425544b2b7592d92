// Embedding, norm and rotation as work for the crew; see row_ops.cpp.
#pragma once
#include "panels.h"
#include "pass.h"
#include "threads.h"

namespace rivulet {

// hidden[row] = multiplier * the table's output token_ids[row].
struct Embed : Work {
    Embed(const Pass& pass, Panels table, float multiplier, float* hidden)
        : pass(pass), table(table), multiplier(multiplier), hidden(hidden) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Panels table;
    const float multiplier;
    float* const hidden;
};

// out[row] = quantised rms_norm(hidden[row]) * weight; of the selected rows only, if told so.
struct Norm : Work {
    Norm(const Pass& pass, const float* hidden, const float* weight, float epsilon, InputRows out, bool selected)
        : pass(pass), hidden(hidden), weight(weight), epsilon(epsilon), out(out), selected(selected) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const float *const hidden, *const weight;
    const float epsilon;
    const InputRows out;
    const bool selected;
};

// out[row] = quantised rows[row].
struct Quantise : Work {
    Quantise(const Pass& pass, const float* rows, InputRows out) : pass(pass), rows(rows), out(out) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const float* const rows;
    const InputRows out;
};

// hidden[row] += multiplier * rows[row], or of their rms_norm where there is a weight.
struct AddRows : Work {
    AddRows(const Pass& pass, const float* rows, const float* weight, float epsilon, float multiplier, float* hidden,
            int width)
        : pass(pass), rows(rows), weight(weight), epsilon(epsilon), multiplier(multiplier), hidden(hidden),
          width(width) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const float *const rows, *const weight;  // [rows][width], [width] or null
    const float epsilon, multiplier;
    float* const hidden;  // [rows][width]
    const int width;
};

// RMS norms of queries and keys: of each head, or of all heads together.
struct HeadNorm {
    const float *query, *key;  // weights; null: no norm
    float epsilon;
    int32_t together;
};

// Norm queries and keys, rotate them by their row's position, scale the queries, write keys and values to their slots.
struct RotateAndStore : Work {
    RotateAndStore(const Pass& pass, const float* projected, HeadNorm norm, const float* rotary, LayerCache cache,
                   int heads, float scale, bf16* queries)
        : pass(pass), projected(projected), norm(norm), rotary(rotary), cache(cache), heads(heads), scale(scale),
          queries(queries) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const float* const projected;
    const HeadNorm norm;
    const float* const rotary;  // [positions][cosines, sines], or null: no rotation
    const LayerCache cache;
    const int heads;
    const float scale;
    bf16* const queries;  // [rows][heads][head_dim]
};

}  // namespace rivulet
