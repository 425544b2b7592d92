// Attention by vectors: a row's query heads that share a key head, against the row's own blocks. Two rows of a sequence, one
// behind the other, go together, for what one reads the other needs; of a row that is alone several key heads do, for what
// they read lies in a row.
#pragma once
#include <algorithm>

#include "attention_head.h"

namespace rivulet {

// A sum of scores ends after so many pairs of numbers, one of values after each block; see PairSum.
constexpr int kPartPairs = 16;

// Key heads of a row that go together: what a block holds of them lies in a row, which processors read ahead.
constexpr int kHeadsTogether = 4;
// Query heads of a key head that go together; where there are more, its keys and values are read again.
constexpr int kQueriesTogether = 4;

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
            seen[h] = {};
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
    SoftmaxState seen[H];

    const bf16* keys(int block) const { return cache.key_tile(table[block], kv_head); }
    const bf16* values(int block) const { return cache.value_tile(table[block], kv_head); }
    bool next_is_behind(int block) const { return table[block + 1] == table[block] + 1; }

    // What rows together read the rows before them have read, so it is near.
    static void fetch(const void* p) { R == 1 ? prefetch_from_memory(p) : prefetch(p); }

    // The scores of B blocks. Where the next ones lie no processor can guess: for each line that is read one of
    // `next` is fetched.
    template <int B>
    void score(int block, int place, const bf16* const* next) {
        const bf16* tiles[B];
        PairSum sums[B][H];
        for (int b = 0; b < B; b++) tiles[b] = keys(block + b);
        for (int part = 0; part < cache.head_dim / 2; part += kPartPairs) {
            for (int i = part; i < part + kPartPairs; i++) {
                Pairs pairs[H];
                for (int h = 0; h < H; h++) pairs[h] = Pairs::all(queries[h] + 2 * i);
                for (int b = 0; b < B; b++) {
                    fetch(next[b] + i * 2 * kBlockTokens);
                    const Pairs two = Pairs::load(tiles[b] + i * 2 * kBlockTokens);
                    for (int h = 0; h < H; h++) sums[b][h].add(two, pairs[h]);
                }
            }
            for (int b = 0; b < B; b++)
                for (int h = 0; h < H; h++) sums[b][h].end_part();
        }
        for (int b = 0; b < B; b++)
            for (int h = 0; h < H; h++) sums[b][h].total.store(scores[h] + place + b * kBlockTokens);
    }

    // Turn one row's scores of `size` tokens into weights, less those before `skipped`. Up to `end` there are tokens that
    // the other row sees.
    void weigh_row(int row, int skipped, int size, int end) {
        for (int h = row * (H / R); h < (row + 1) * (H / R); h++)
            weigh(seen[h], scores[h], weights[h], skipped, size, end, total[h], cache.head_dim);
    }

    // Add V vectors, from number `d`, of the values in the blocks from `block` to `end` of a stretch that begins with block
    // `first` and has `size` tokens, a pair at a time. Whole pairs only hold what was written: a slot beyond the row's
    // position may hold anything, not-a-number included, and zero times that is no zero. `next_after` a block some values
    // are read that are fetched with its own.
    template <int V, typename Next>
    void add_values(int first, int block, int end, int size, int d, Next next_after) {
        PairSum sums[H][V];
        for (int h = 0; h < H; h++)
            for (int v = 0; v < V; v++) sums[h][v].total = Floats::load(total[h] + (d + v) * kLanes);
        const auto add = [&](int v, Pairs two, int token) {
            for (int h = 0; h < H; h++) sums[h][v].add(two, Pairs::all(weights[h] + token));
        };
        const int stride = 2 * cache.head_dim;
        for (; block < end; block++) {
            const bf16* tile = values(block) + d * 2 * kLanes;
            const bf16* next = next_after(block) + d * 2 * kLanes;
            const int token = (block - first) * kBlockTokens, count = std::min(size - token, kBlockTokens);
            for (int j = 0; j < count / 2; j++, tile += stride, next += stride)
                for (int v = 0; v < V; v++) {
                    fetch(next + v * 2 * kLanes);
                    add(v, Pairs::load(tile + v * 2 * kLanes), token + 2 * j);
                }
            if (count % 2)
                for (int v = 0; v < V; v++) add(v, Pairs::load(tile + v * 2 * kLanes).first(), token + count - 1);
            for (int h = 0; h < H; h++)
                for (int v = 0; v < V; v++) sums[h][v].end_part();
        }
        for (int h = 0; h < H; h++)
            for (int v = 0; v < V; v++) sums[h][v].total.store(total[h] + (d + v) * kLanes);
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

// The scores of a stretch's blocks, from `first` to `end`, for `count` key heads: of several blocks at a time; or block by block,
// where a processor that reads ahead finds what comes next, for all heads are read and the next block lies behind.
template <typename All>
void score_stretch(All* heads, int count, int first, int end) {
    constexpr int kBlocks = All::kBlocks;
    const bool reads_ahead = kReadsBlocksAhead && kBlocks > 1 && count > 1 && count == heads->cache.kv_heads;
    for (int block = first; block < end;) {
        const bool alone = block + kBlocks > end || (reads_ahead && heads->next_is_behind(block));
        const int following = alone ? block + 1 : block + kBlocks;
        for (int k = 0; k < count; k++) {
            const bf16* next[kBlocks];
            for (int b = 0; b < kBlocks; b++)  // after the last keys come the first values
                next[b] = k + 1 < count         ? heads[k + 1].keys(std::min(block + b, end - 1))
                          : following + b < end ? heads[0].keys(following + b)
                                                : heads[0].values(std::min(first + b, end - 1));
            const int place = (block - first) * kBlockTokens;
            if (alone)
                heads[k].template score<1>(block, place, next);
            else
                heads[k].template score<kBlocks>(block, place, next);
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

// H query heads, from number `first_head`, of each of `count` key heads, of R rows; of several rows one key head.
template <int R, int H>
void attend_heads(const Attention& op, int row, int kv_head, int count, int first_head) {
    const int dim = op.cache.head_dim, group = op.heads / op.cache.kv_heads;
    const int64_t stride = int64_t(op.heads) * dim;
    Heads<R, R * H> heads[R > 1 ? 1 : kHeadsTogether];
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
                heads[k].weigh_row(r, std::max(op.first_seen(row + r) - start, 0), std::max(own, 0), size);
            }
        add_stretch(heads, count, first, end, size);
    }
    for (int k = 0; k < count; k++)
        for (int h = 0; h < R * H; h++)
            write_head(op, row + h / H, (kv_head + k) * group + first_head + h % H, heads[k].seen[h], heads[k].total[h]);
}

template <int R>
void attend_rows(const Attention& op, int row, int kv_head, int count) {
    const int group = op.heads / op.cache.kv_heads;
    int h = 0;
    for (; h + kQueriesTogether <= group; h += kQueriesTogether)
        attend_heads<R, kQueriesTogether>(op, row, kv_head, count, h);
    if (group - h == 3) attend_heads<R, 3>(op, row, kv_head, count, h);
    if (group - h == 2) attend_heads<R, 2>(op, row, kv_head, count, h);
    if (group - h == 1) attend_heads<R, 1>(op, row, kv_head, count, h);
}

// All query heads of `count` key heads, kHeadsTogether at most, of `rows` rows of a sequence, one behind the other, that see
// the same first block. Rows that go together take head after head, whose keys and values stay near from row to row.
inline void attend_by_vectors(const Attention& op, int row, int rows, int kv_head, int count) {
    int r = 0;
    if constexpr (kRowsTogether > 1)
        for (; r + kRowsTogether <= rows; r += kRowsTogether)
            for (int k = kv_head; k < kv_head + count; k++) attend_rows<kRowsTogether>(op, row + r, k, 1);
    for (; r < rows; r++) attend_rows<1>(op, row + r, kv_head, count);
}

}  // namespace rivulet
