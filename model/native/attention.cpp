// One row's query heads that share a key head, against the row's own blocks: online softmax, block by block
// (arXiv:1805.02867). A row sees the positions up to its own; what else lies in a block is never read into a sum.
#include "attention.h"

#include <cmath>

namespace rivulet {
namespace {

constexpr int kMostVectors = kMostHeadDim / kLanes;

// H query heads at a time; D vectors of 16 a head, or any number if D is 0.
template <int H, int D>
void attend(const Attention& op, int row, int kv_head, int first_head) {
    const LayerCache& cache = op.cache;
    const int dim = cache.head_dim, vectors = D ? D : dim / kLanes;
    const int32_t* table = op.pass.table_of(row, cache.group);
    const int visible = op.pass.positions[row] + 1;
    const bf16* queries = op.queries + (int64_t(row) * op.heads + first_head) * dim;
    Floats total[H][D ? D : kMostVectors];
    float largest[H], weight[H];
    for (int h = 0; h < H; h++) {
        largest[h] = -INFINITY;
        weight[h] = 0;
        for (int d = 0; d < vectors; d++) total[h][d] = Floats::zero();
    }
    const int first = op.window && visible > op.window ? visible - op.window : 0;
    for (int start = first / kBlockTokens * kBlockTokens; start < visible; start += kBlockTokens) {
        const int64_t block = table[start / kBlockTokens];
        const bf16 *keys = cache.key_tile(block, kv_head), *values = cache.value_tile(block, kv_head);
        // Where the next block lies no processor can guess: a line of it is fetched for each that is read.
        const int64_t next = start + kBlockTokens < visible ? table[start / kBlockTokens + 1] : block;
        const bf16 *next_keys = cache.key_tile(next, kv_head), *next_values = cache.value_tile(next, kv_head);
        const int skipped = first > start ? first - start : 0;
        const int count = visible - start < kBlockTokens ? visible - start : kBlockTokens;
        Floats scores[H];
        for (int h = 0; h < H; h++) scores[h] = Floats::zero();
        for (int i = 0; i < dim / 2; i++) {
            prefetch(next_keys + i * 2 * kBlockTokens);
            for (int h = 0; h < H; h++) {
                uint32_t pair;
                std::memcpy(&pair, queries + h * dim + 2 * i, 4);
                scores[h] = dot(scores[h], keys + i * 2 * kBlockTokens, pair);
            }
        }
        alignas(64) bf16 weights[H][kBlockTokens];
        for (int h = 0; h < H; h++) {
            scores[h] = only(scores[h], skipped, count, -INFINITY);
            const float peak = max(scores[h]);
            if (peak > largest[h]) {
                const float shrink = std::exp(largest[h] - peak);
                largest[h] = peak;
                weight[h] *= shrink;
                for (int d = 0; d < vectors; d++) total[h][d] = total[h][d] * Floats::all(shrink);
            }
            const Floats shares = only(exp(scores[h] - Floats::all(largest[h])), skipped, count, 0.0f);
            weight[h] += sum(shares);
            store_bf16(shares, weights[h]);
        }
        // A pair of tokens at a time. Whole pairs only hold what was written: a slot beyond the row's position
        // may hold anything, not-a-number included, and zero times that is no zero.
        const int pairs = count / 2;
        for (int j = 0; j < pairs; j++) {
            for (int d = 0; d < vectors; d++) prefetch(next_values + (j * dim + d * kLanes) * 2);
            for (int h = 0; h < H; h++) {
                uint32_t pair;
                std::memcpy(&pair, &weights[h][2 * j], 4);
                for (int d = 0; d < vectors; d++)
                    total[h][d] = dot(total[h][d], values + (j * dim + d * kLanes) * 2, pair);
            }
        }
        if (count % 2) {
            const bf16* last = values + pairs * dim * 2;
            for (int d = 0; d < vectors; d++) {
                alignas(64) bf16 lone[2 * kLanes];
                for (int i = 0; i < kLanes; i++) {
                    lone[2 * i] = last[(d * kLanes + i) * 2];
                    lone[2 * i + 1] = 0;
                }
                for (int h = 0; h < H; h++) total[h][d] = dot(total[h][d], lone, weights[h][count - 1]);
            }
        }
    }
    for (int h = 0; h < H; h++) {
        const Floats share = Floats::all(1.0f / weight[h]);
        for (int d = 0; d < vectors; d += 2)
            write_group(total[h][d] * share, total[h][d + 1] * share, op.out, row,
                        (first_head + h) * dim / kGroup + d / 2);
    }
}

template <int D>
void attend_group(const Attention& op, int row, int kv_head) {
    const int group = op.heads / op.cache.kv_heads;
    int h = kv_head * group;
    const int end = h + group;
    for (; h + 4 <= end; h += 4) attend<4, D>(op, row, kv_head, h);
    if (end - h == 3) attend<3, D>(op, row, kv_head, h);
    if (end - h == 2) attend<2, D>(op, row, kv_head, h);
    if (end - h == 1) attend<1, D>(op, row, kv_head, h);
}

}  // namespace

void Attention::run(int64_t task) const {
    const int row = int(task / cache.kv_heads), kv_head = int(task % cache.kv_heads);
    switch (cache.head_dim / kLanes) {
        case 4: return attend_group<4>(*this, row, kv_head);
        case 8: return attend_group<8>(*this, row, kv_head);
        default: return attend_group<0>(*this, row, kv_head);
    }
}

}  // namespace rivulet
