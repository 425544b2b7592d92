// A row's query heads that share a key head, against the row's own blocks: online softmax (arXiv:1805.02867) over a
// stretch of them at a time. Two rows of a sequence, one behind the other, go together, for what one reads the other needs;
// and so do several key heads, for what they read lies in a row. A row sees the positions up to its own; what else lies in
// a block is never read into a sum.
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace rivulet {
namespace {

constexpr int kStretch = kStretchBlocks * kBlockTokens;

// H query heads, those of each of R rows one after the other, and what they have seen so far.
template <int R, int H>
struct Heads {
    // The rows' queries are `stride` apart.
    void begin(const LayerCache& of, const bf16* first_queries, int64_t stride, int key_head, const int32_t* blocks) {
        cache = of;
        kv_head = key_head;
        table = blocks;
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
    LayerCache cache;
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

    // Add V vectors, from number `d`, of the values in the blocks from `block` to `end` of a stretch that begins with block
    // `first` and has `size` tokens, a pair at a time. Whole pairs only hold what was written: a slot beyond the row's
    // position may hold anything, not-a-number included, and zero times that is no zero. `next_after` a block some values
    // are read that are fetched with its own.
    template <int V, typename Next>
    void add_values(int first, int block, int end, int size, int d, Next next_after) {
        Floats sums[H][V];
        for (int h = 0; h < H; h++)
            for (int v = 0; v < V; v++) sums[h][v] = Floats::load(total[h] + (d + v) * kLanes);
        const auto add = [&](int v, Pairs two, int token) {
            for (int h = 0; h < H; h++) sums[h][v] = dot(sums[h][v], two, Pairs::all(weights[h] + token));
        };
        const int stride = 2 * cache.head_dim;
        for (; block < end; block++) {
            const bf16* tile = values(block) + d * 2 * kLanes;
            const bf16* next = next_after(block) + d * 2 * kLanes;
            const int token = (block - first) * kBlockTokens, count = std::min(size - token, kBlockTokens);
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
    // The same of all vectors.
    template <typename Next>
    void add_values(int first, int block, int end, int size, Next next_after) {
        const int vectors = cache.head_dim / kLanes;
        int d = 0;
        for (; d + kVectors <= vectors; d += kVectors) add_values<kVectors>(first, block, end, size, d, next_after);
        if constexpr (kVectors > 2)
            if (d < vectors) add_values<2>(first, block, end, size, d, next_after);
    }
};

// The scores of a stretch's blocks, from `first` to `end`, for `count` key heads.
template <typename All>
void score_stretch(All* heads, int count, int first, int end) {
    constexpr int kBlocks = All::kBlocks;
    for (int block = first; block < end;) {
        const int following = block + kBlocks <= end ? block + kBlocks : block + 1;
        for (int k = 0; k < count; k++) {
            const bf16* next[kBlocks];
            for (int b = 0; b < kBlocks; b++)  // after the last keys come the first values
                next[b] = k + 1 < count         ? heads[k + 1].keys(std::min(block + b, end - 1))
                          : following + b < end ? heads[0].keys(following + b)
                                                : heads[0].values(std::min(first + b, end - 1));
            const int place = (block - first) * kBlockTokens;
            if (following == block + kBlocks)
                heads[k].template score<kBlocks>(block, place, next);
            else
                heads[k].template score<1>(block, place, next);
        }
        block = following;
    }
}

// Add the values of its `size` tokens.
template <typename All>
void add_stretch(All* heads, int count, int first, int end, int size) {
    const int step = count > 1 ? 1 : end - first;  // one alone keeps its sums in registers from block to block
    for (int block = first; block < end; block += step)
        for (int k = 0; k < count; k++)
            heads[k].add_values(first, block, block + step, size, [&](int current) {
                const int ahead = k + All::kBlocks;
                return heads[ahead % count].values(std::min(current + ahead / count, end - 1));
            });
}

// H query heads, from number `first_head`, of each of `count` key heads, of R rows of a sequence that see the same first
// block.
template <int R, int H>
void attend(const Attention& op, int row, int kv_head, int count, int first_head) {
    const int dim = op.cache.head_dim, group = op.heads / op.cache.kv_heads;
    const int64_t stride = int64_t(op.heads) * dim;
    Heads<R, R * H> heads[kHeadsTogether];
    for (int k = 0; k < count; k++) {
        const bf16* queries = op.queries + row * stride + ((kv_head + k) * group + first_head) * dim;
        heads[k].begin(op.cache, queries, stride, kv_head + k, op.pass.table_of(row, op.cache.group));
    }
    const int visible = op.pass.positions[row + R - 1] + 1;
    for (int start = op.first_seen(row) / kBlockTokens * kBlockTokens; start < visible; start += kStretch) {
        const int size = std::min(visible - start, kStretch), first = start / kBlockTokens;
        const int end = first + int(divide_up(size, kBlockTokens));
        score_stretch(heads, count, first, end);
        for (int k = 0; k < count; k++)
            for (int r = 0; r < R; r++) {
                const int own = std::min(op.pass.positions[row + r] + 1 - start, size);
                heads[k].weigh(r, std::max(op.first_seen(row + r) - start, 0), std::max(own, 0), size);
            }
        add_stretch(heads, count, first, end, size);
    }
    for (int k = 0; k < count; k++)
        for (int h = 0; h < R * H; h++) {
            const Floats share = Floats::all(1.0f / heads[k].weight[h]);
            const auto part = [&](int d) { return Floats::load(heads[k].total[h] + d) * share; };
            const int head = (kv_head + k) * group + first_head + h % H;
            for (int d = 0; d < dim; d += kGroup)
                write_group(part(d), part(d + kLanes), op.out, row + h / H, (head * dim + d) / kGroup);
        }
}

// All query heads of `count` key heads.
template <int R>
void attend(const Attention& op, int row, int kv_head, int count) {
    const int group = op.heads / op.cache.kv_heads;
    int h = 0;
    for (; h + 4 <= group; h += 4) attend<R, 4>(op, row, kv_head, count, h);
    if (group - h == 3) attend<R, 3>(op, row, kv_head, count, h);
    if (group - h == 2) attend<R, 2>(op, row, kv_head, count, h);
    if (group - h == 1) attend<R, 1>(op, row, kv_head, count, h);
}

}  // namespace

int64_t Attention::tasks() const {
    return divide_up(pass.rows, rows_a_task()) * divide_up(cache.kv_heads, heads_a_task());
}

void Attention::run(int64_t task) const {
    const int parts = int(divide_up(cache.kv_heads, heads_a_task()));
    const int row = int(task / parts) * rows_a_task(), kv_head = int(task % parts) * heads_a_task();
    const int count = std::min(heads_a_task(), cache.kv_heads - kv_head);
    const auto is_pair = [&] {
        return pass.sequences[row] == pass.sequences[row + 1] && pass.positions[row] + 1 == pass.positions[row + 1] &&
               first_seen(row) / kBlockTokens == first_seen(row + 1) / kBlockTokens;
    };
    if (rows_a_task() == 1 || row + 1 == pass.rows) return attend<1>(*this, row, kv_head, count);
    if (is_pair()) return attend<kRowsTogether>(*this, row, kv_head, count);
    attend<1>(*this, row, kv_head, count);
    attend<1>(*this, row + 1, kv_head, count);
}

}  // namespace rivulet
