// What attention does for one query head, however its products are computed: online softmax (arXiv:1805.02867) over a stretch
// of tokens at a time, and the result.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "rows.h"

namespace rivulet {

// Tokens of a stretch.
constexpr int kStretch = kStretchBlocks * kBlockTokens;

// What a head has seen: the largest score, and the sum of its weights, as shares of e to that score.
struct SoftmaxState {
    float largest = -INFINITY, weight = 0;
};

// Weights are bfloat16, or floats of such a value.
inline void store_weight(Floats x, bf16* p) { store_bf16(x, p); }
inline void store_weight(Floats x, float* p) { rounded_to_bf16(x).store(p); }

// Turn scores of `size` tokens into weights, those before `skipped` into zeros, and shrink what was seen before, `total` of
// `dim` included, if there is a larger one among them. Up to `end` there are tokens that other rows see: zeros, too.
template <typename Weight>
void weigh(SoftmaxState& seen, float* scores, Weight* weights, int skipped, int size, int end, float* total, int dim) {
    const int vectors = int(divide_up(size, kLanes));
    if (size > 0) {
        std::fill(scores, scores + skipped, -INFINITY);
        std::fill(scores + size, scores + vectors * kLanes, -INFINITY);
        Floats most = Floats::load(scores);
        for (int i = 1; i < vectors; i++) most = max(most, Floats::load(scores + i * kLanes));
        const float peak = max(most);
        if (peak > seen.largest) {
            const float shrink = seen.largest == -INFINITY ? 0.0f : std::exp(seen.largest - peak);
            seen.largest = peak;
            seen.weight *= shrink;
            for (int d = 0; d < dim; d += kLanes) (Floats::load(total + d) * Floats::all(shrink)).store(total + d);
        }
        Floats all = Floats::zero();
        for (int i = 0; i < vectors; i++) {
            const Floats share = exp(Floats::load(scores + i * kLanes) - Floats::all(seen.largest));
            store_weight(share, weights + i * kLanes);
            all = all + share;
        }
        seen.weight += sum(all);  // what is not seen has e^-87, which is nothing beside the largest
        std::fill(weights, weights + skipped, Weight(0));
    }
    std::fill(weights + size, weights + divide_up(end, kLanes) * kLanes, Weight(0));
}

// Write the result of query head number `head` of a row.
inline void write_head(const Attention& op, int row, int head, const SoftmaxState& seen, const float* total) {
    const Floats share = Floats::all(1.0f / seen.weight);
    const int dim = op.cache.head_dim;
    for (int d = 0; d < dim; d += kGroup)
        write_group(Floats::load(total + d) * share, Floats::load(total + d + kLanes) * share, op.out, row,
                    (head * dim + d) / kGroup);
}

}  // namespace rivulet
