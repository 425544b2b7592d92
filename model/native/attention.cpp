// A row's query heads that share a key head, against the row's own blocks: online softmax (arXiv:1805.02867) over a
// stretch of them at a time. Two rows of a sequence, one behind the other, go together, for what one reads the other needs.
// A row sees the positions up to its own; what else lies in a block is never read into a sum.
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace rivulet {
namespace {

constexpr int kStretch = 32 * kBlockTokens;  // tokens whose scores stay in the first-level cache

// H query heads, those of each of R rows one after the other, and what they have seen so far.
template <int R, int H>
struct Heads {
    // The rows' queries are `stride` apart.
    Heads(const LayerCache& cache, const bf16* first_queries, int64_t stride, int kv_head, const int32_t* table)
        : cache(cache), kv_head(kv_head), table(table) {
        for (int h = 0; h < H; h++) {
            const bf16* query = first_queries + h / (H / R) * stride + h % (H / R) * cache.head_dim;
            for (int d = 0; d < cache.head_dim; d += kLanes) Pairs::store(Floats::load_bf16(query + d), queries[h] + d);
            largest[h] = -INFINITY;
            weight[h] = 0;
            std::fill(total[h], total[h] + cache.head_dim, 0.0f);
        }
    }
    // Blocks and vectors of values whose sums for all heads are in work together.
    static constexpr int kBlocks = std::min(kBlocksAtOnce, kAttentionSums / H);
    static constexpr int kVectors = H * 4 <= kAttentionSums ? 4 : H * 2 <= kAttentionSums ? 2 : 1;
    const LayerCache& cache;
    int kv_head;
    const int32_t* table;
    alignas(64) float total[H][kMostHeadDim];
    alignas(64) float scores[H][kStretch];
    alignas(64) Pairs::Element queries[H][kMostHeadDim];
    alignas(64) Pairs::Element weights[H][kStretch];
    float largest[H], weight[H];

    const bf16* keys(int block) const { return cache.key_tile(table[block], kv_head); }
    const bf16* values(int block) const { return cache.value_tile(table[block], kv_head); }

    // The scores of B blocks. Where the next ones lie no processor can guess: for each line that is read one of
    // `next` is fetched.
    template <int B>
    void score(int block, int place, const bf16* const* next) {
        const bf16* tiles[B];
        Floats sums[B][H];
        for (int b = 0; b < B; b++) {
            tiles[b] = keys(block + b);
            for (int h = 0; h < H; h++) sums[b][h] = Floats::zero();
        }
        for (int i = 0; i < cache.head_dim / 2; i++) {
            Pairs pairs[H];
            for (int h = 0; h < H; h++) pairs[h] = Pairs::all(queries[h] + 2 * i);
            for (int b = 0; b < B; b++) {
                prefetch(next[b] + i * 2 * kBlockTokens);
                const Pairs two = Pairs::load(tiles[b] + i * 2 * kBlockTokens);
                for (int h = 0; h < H; h++) sums[b][h] = dot(sums[b][h], two, pairs[h]);
            }
        }
        for (int b = 0; b < B; b++)
            for (int h = 0; h < H; h++) sums[b][h].store(scores[h] + place + b * kBlockTokens);
    }

    // The scores of blocks from `first` to `end`.
    void score_all(int first, int end) {
        const bf16* next[kBlocks];
        for (int block = first; block < end;) {
            const int following = block + kBlocks;
            for (int b = 0; b < kBlocks; b++)  // after the last keys come the first values
                next[b] = following + b < end ? keys(following + b) : values(std::min(first + b, end - 1));
            const int place = (block - first) * kBlockTokens;
            if (following <= end) {
                score<kBlocks>(block, place, next);
                block = following;
            } else {
                score<1>(block++, place, next);
            }
        }
    }

    // Turn one row's scores of `size` tokens into weights, less those before `skipped`, and shrink what was seen before if
    // there is a larger one among them. Up to `end` there are tokens that the other row sees.
    void weigh(int row, int skipped, int size, int end) {
        const int vectors = (size + kLanes - 1) / kLanes;
        for (int h = row * (H / R); h < (row + 1) * (H / R); h++) {
            if (size > 0) weigh_head(h, skipped, size, vectors);
            std::fill(weights[h] + size, weights[h] + (end + kLanes - 1) / kLanes * kLanes, Pairs::Element(0));
        }
    }

    void weigh_head(int h, int skipped, int size, int vectors) {
        std::fill(scores[h], scores[h] + skipped, -INFINITY);
        std::fill(scores[h] + size, scores[h] + vectors * kLanes, -INFINITY);
        Floats most = Floats::load(scores[h]);
        for (int i = 1; i < vectors; i++) most = max(most, Floats::load(scores[h] + i * kLanes));
        const float peak = max(most);
        if (peak > largest[h]) {
            const float shrink = largest[h] == -INFINITY ? 0.0f : std::exp(largest[h] - peak);
            largest[h] = peak;
            weight[h] *= shrink;
            for (int d = 0; d < cache.head_dim; d += kLanes)
                (Floats::load(total[h] + d) * Floats::all(shrink)).store(total[h] + d);
        }
        Floats all = Floats::zero();
        for (int i = 0; i < vectors; i++) {
            const Floats share = exp(Floats::load(scores[h] + i * kLanes) - Floats::all(largest[h]));
            Pairs::store(share, weights[h] + i * kLanes);
            all = all + share;
        }
        weight[h] += sum(all);  // what is not seen has e^-87, which is nothing beside the largest
        std::fill(weights[h], weights[h] + skipped, Pairs::Element(0));
    }

    // Add V vectors, from number `d`, of the values of `size` tokens, a pair at a time. Whole pairs only hold what was
    // written: a slot beyond the row's position may hold anything, not-a-number included, and zero times that is no zero.
    template <int V>
    void add_values(int first, int size, int d) {
        Floats sums[H][V];
        for (int h = 0; h < H; h++)
            for (int v = 0; v < V; v++) sums[h][v] = Floats::load(total[h] + (d + v) * kLanes);
        const auto add = [&](int v, Pairs two, int token) {
            for (int h = 0; h < H; h++) sums[h][v] = dot(sums[h][v], two, Pairs::all(weights[h] + token));
        };
        const int stride = 2 * cache.head_dim, last = (size - 1) / kBlockTokens;
        for (int block = 0; block <= last; block++) {
            const bf16* tile = values(first + block) + d * 2 * kLanes;
            const bf16* next = values(first + std::min(block + kBlocks, last)) + d * 2 * kLanes;
            const int token = block * kBlockTokens, count = std::min(size - token, kBlockTokens);
            for (int j = 0; j < count / 2; j++, tile += stride, next += stride)
                for (int v = 0; v < V; v++) {
                    prefetch(next + v * 2 * kLanes);
                    add(v, Pairs::load(tile + v * 2 * kLanes), token + 2 * j);
                }
            if (count % 2)
                for (int v = 0; v < V; v++) add(v, Pairs::load(tile + v * 2 * kLanes).first(), token + count - 1);
        }
        for (int h = 0; h < H; h++)
            for (int v = 0; v < V; v++) sums[h][v].store(total[h] + (d + v) * kLanes);
    }
};

// H query heads from number `first_head` of R rows of a sequence, that see the same first block.
template <int R, int H>
void attend(const Attention& op, int row, int kv_head, int first_head) {
    const int dim = op.cache.head_dim, vectors = dim / kLanes;
    const int64_t stride = int64_t(op.heads) * dim;
    Heads<R, R * H> heads(op.cache, op.queries + row * stride + first_head * dim, stride, kv_head,
                          op.pass.table_of(row, op.cache.group));
    const int visible = op.pass.positions[row + R - 1] + 1;
    for (int start = op.first_seen(row) / kBlockTokens * kBlockTokens; start < visible; start += kStretch) {
        const int size = std::min(visible - start, kStretch), first = start / kBlockTokens;
        heads.score_all(first, first + (size + kBlockTokens - 1) / kBlockTokens);
        for (int r = 0; r < R; r++) {
            const int own = std::min(op.pass.positions[row + r] + 1 - start, size);
            heads.weigh(r, std::max(op.first_seen(row + r) - start, 0), std::max(own, 0), size);
        }
        int d = 0;
        constexpr int kVectors = decltype(heads)::kVectors;
        for (; d + kVectors <= vectors; d += kVectors) heads.template add_values<kVectors>(first, size, d);
        if constexpr (kVectors > 2)
            if (d < vectors) heads.template add_values<2>(first, size, d);
    }
    for (int h = 0; h < R * H; h++) {
        const Floats share = Floats::all(1.0f / heads.weight[h]);
        const auto part = [&](int d) { return Floats::load(heads.total[h] + d) * share; };
        for (int d = 0; d < dim; d += kGroup)
            write_group(part(d), part(d + kLanes), op.out, row + h / H, ((first_head + h % H) * dim + d) / kGroup);
    }
}

// All query heads of a key head.
template <int R>
void attend(const Attention& op, int row, int kv_head) {
    const int group = op.heads / op.cache.kv_heads;
    int h = kv_head * group;
    const int end = h + group;
    for (; h + 4 <= end; h += 4) attend<R, 4>(op, row, kv_head, h);
    if (end - h == 3) attend<R, 3>(op, row, kv_head, h);
    if (end - h == 2) attend<R, 2>(op, row, kv_head, h);
    if (end - h == 1) attend<R, 1>(op, row, kv_head, h);
}

}  // namespace

int64_t Attention::tasks() const { return divide_up(pass.rows, rows_a_task()) * cache.kv_heads; }

void Attention::run(int64_t task) const {
    const int kv_head = int(task % cache.kv_heads), row = int(task / cache.kv_heads) * rows_a_task();
    const auto is_pair = [&] {
        return pass.sequences[row] == pass.sequences[row + 1] && pass.positions[row] + 1 == pass.positions[row + 1] &&
               first_seen(row) / kBlockTokens == first_seen(row + 1) / kBlockTokens;
    };
    if (rows_a_task() == 1 || row + 1 == pass.rows) return attend<1>(*this, row, kv_head);
    if (is_pair()) return attend<kRowsTogether>(*this, row, kv_head);
    attend<1>(*this, row, kv_head);
    attend<1>(*this, row + 1, kv_head);
}

}  // namespace rivulet
