// Embedding, norm and rotation as work for the crew; see row_ops.cpp.
#pragma once
#include "panels.h"
#include "pass.h"
#include "threads.h"

namespace rivulet {

// hidden[row] = the table's output token_ids[row].
struct Embed : Work {
    Embed(const Pass& pass, Panels table, float* hidden) : pass(pass), table(table), hidden(hidden) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Panels table;
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

// Rotate queries and keys by their row's position, scale the queries, write keys and values to their slots.
struct RotateAndStore : Work {
    RotateAndStore(const Pass& pass, const float* projected, const float* rotary, LayerCache cache, int heads,
                   bf16* queries)
        : pass(pass), projected(projected), rotary(rotary), cache(cache), heads(heads), queries(queries) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const float *const projected, *const rotary;  // rotary: [positions][cosines, sines]
    const LayerCache cache;
    const int heads;
    bf16* const queries;  // [rows][heads][head_dim]
};

}  // namespace rivulet
