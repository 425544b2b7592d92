// Paged grouped attention: attention.cpp cuts it into tasks, tile_attention.h and vector_attention.h compute one.
#pragma once
#include "panels.h"
#include "pass.h"
#include "threads.h"

namespace rivulet {

struct Attention : Work {
    Attention(const Pass& pass, const bf16* queries, LayerCache cache, int heads, int window, InputRows out)
        : pass(pass), queries(queries), cache(cache), heads(heads), window(window), out(out) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const bf16* const queries;  // [rows][heads][head_dim], scaled
    const LayerCache cache;
    const int heads;
    const int window;  // positions that a row sees, its own included; 0: all up to its own
    const InputRows out;  // [rows][heads * head_dim]

    int first_seen(int row) const { return rivulet::first_seen(pass.positions[row], window); }
    int rows_a_task() const;
    int heads_a_task() const;
};

}  // namespace rivulet
