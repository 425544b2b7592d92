// Once the last layer's keys and values are stored, only the rows whose logits are wanted go on.
#pragma once
#include <vector>

#include "pass.h"
#include "scalar.h"
#include "threads.h"

namespace rivulet {

// The selected rows of a pass as a pass of their own, all of it selected; its numbers stand in `numbers`. The pass itself
// if it does not narrow, or if the selected rows do not stand in their order.
Pass narrowed(const Pass& pass, std::vector<int32_t>& numbers);

// Moves what those rows need of the others' to the front.
struct Narrow : Work {
    Narrow(const Pass& pass, const Pass& narrowed, float* hidden, int width, bf16* queries, int query_width)
        : pass(pass), narrowed(narrowed), hidden(hidden), width(width), queries(queries), query_width(query_width) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass &pass, &narrowed;
    float* const hidden;  // [rows][width]
    const int width;
    bf16* const queries;  // [rows][query_width]
    const int query_width;
};

}  // namespace rivulet
