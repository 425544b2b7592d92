// Attention by tiles: up to 16 queries of a key head at a time, those of consecutive rows of a sequence included.
//
// A block's keys are a tile of weights as they lie in the cache, for each 32 numbers of the head, and its values one for each
// 16. The sums are added in the order of PairSum (vector.h), so a row has the same bits whether tiles computed it or vectors.
#pragma once
#include "attention_head.h"
#include "tiles.h"
#include "unrolled.h"

namespace rivulet {

#if defined(RIVULET_TILES)

// With fewer queries vectors are as fast, and leave more time to memory.
constexpr int kLeastTileQueries = 6;

class TileAttention {
  public:
    // `heads` query heads, from number `first_head` of those of a key head, of each of `rows` rows: 16 together at most.
    TileAttention(const Attention& op, int row, int rows, int kv_head, int first_head, int heads)
        : op_(op), dim_(op.cache.head_dim), row_(row), rows_(rows), kv_head_(kv_head), heads_(heads),
          first_head_(kv_head * (op.heads / op.cache.kv_heads) + first_head),
          table_(op.pass.table_of(row, op.cache.group)) {
        for (int i = 0; i < count(); i++) {
            const int64_t query = int64_t(row + i / heads) * op.heads + first_head_ + i % heads;
            std::copy_n(op.queries + query * dim_, dim_, queries_[i]);
            std::fill_n(totals_[i], dim_, 0.0f);
        }
    }

    void run() {
        const TileShape sums{count(), kTileBytes}, weights{count(), 2 * kBlockTokens};
        const TileShape keys{kTileRows, kTileBytes}, values{kBlockTokens / 2, kTileBytes};
        const Tiles tiles({sums, sums, sums, sums, sums, weights, keys, values});
        const int visible = op_.pass.positions[row_ + rows_ - 1] + 1;
        for (int start = op_.first_seen(row_) / kBlockTokens * kBlockTokens; start < visible; start += kStretch) {
            const int size = std::min(visible - start, kStretch), first = start / kBlockTokens;
            score(first, first + int(divide_up(size, kBlockTokens)));
            for (int i = 0; i < count(); i++) {
                const int own = row_ + i / heads_, skipped = std::max(op_.first_seen(own) - start, 0);
                const int sees = std::clamp(op_.pass.positions[own] + 1 - start, 0, size);
                weigh(seen_[i], scores_[i], weights_[i], skipped, sees, size, totals_[i], dim_);
            }
            int d = 0;
            for (; d + 4 * kLanes <= dim_; d += 4 * kLanes) add_values<4>(first, size, d);
            if (d < dim_) add_values<2>(first, size, d);
        }
        for (int i = 0; i < count(); i++)
            write_head(op_, row_ + i / heads_, first_head_ + i % heads_, seen_[i], totals_[i]);
    }

  private:
    // Blocks so many on are fetched meanwhile: no processor can guess where they lie.
    static constexpr int kAhead = 4;

    int count() const { return rows_ * heads_; }
    const bf16* keys(int block) const { return op_.cache.key_tile(table_[block], kv_head_); }
    const bf16* values(int block) const { return op_.cache.value_tile(table_[block], kv_head_); }

    // The scores of the blocks from `first` to `end`.
    void score(int first, int end) {
        constexpr int kPart = kTileBytes / 2;  // numbers of a head that a tile takes
        for (int block = first; block < end; block++) {
            const int after = block + kAhead - end;  // the keys come the values
            const bf16* next = after < 0 ? keys(block + kAhead) : values(std::min(first + after, end - 1));
            Tiles::zero<0>();
            for (int d = 0; d < dim_; d += kPart) {
                for (int i = 0; i < kTileRows; i++) prefetch(next + (d + 2 * i) * kBlockTokens);
                Tiles::load<4>(queries_[0] + d, sizeof queries_[0]);
                Tiles::load<6>(keys(block) + d * kBlockTokens, kTileBytes);
                Tiles::multiply_bf16<0, 4, 6>();
            }
            Tiles::store<0>(scores_[0] + (block - first) * kBlockTokens, sizeof scores_[0]);
        }
    }

    // Add V vectors of a stretch's `size` values, from number `d` of the head.
    template <int V>
    void add_values(int first, int size, int d) {
        unrolled<V>([&](auto v) { Tiles::load<v>(totals_[0] + d + v * kLanes, sizeof totals_[0]); });
        const int end = first + int(divide_up(size, kBlockTokens));
        for (int block = first; block < end; block++) {
            const bf16* next = values(std::min(block + kAhead, end - 1)) + 2 * d;
            const bf16* tile = values(block) + 2 * d;
            int64_t stride = 4 * dim_;  // bytes of a pair of tokens
            alignas(64) bf16 seen[kBlockTokens / 2][2 * V * kLanes];
            if (const int left = size - (block - first) * kBlockTokens; left < kBlockTokens) {
                // A slot beyond what the rows see may hold anything, not-a-number included, and zero times that is no zero.
                for (int pair = 0; pair < kBlockTokens / 2; pair++)
                    for (int i = 0; i < 2 * V * kLanes; i++)
                        seen[pair][i] = 2 * pair + i % 2 < left ? tile[pair * 2 * dim_ + i] : bf16(0);
                tile = seen[0];
                stride = sizeof seen[0];
            }
            Tiles::load<5>(weights_[0] + (block - first) * kBlockTokens, sizeof weights_[0]);
            unrolled<V>([&](auto v) {
                for (int i = 0; i < kBlockTokens / 2; i++) prefetch(next + i * 2 * dim_ + v * 2 * kLanes);
                Tiles::load<7>(tile + v * 2 * kLanes, stride);
                Tiles::multiply_bf16<v, 5, 7>();
            });
        }
        unrolled<V>([&](auto v) { Tiles::store<v>(totals_[0] + d + v * kLanes, sizeof totals_[0]); });
    }

    const Attention& op_;
    const int dim_, row_, rows_, kv_head_, heads_, first_head_;
    const int32_t* const table_;
    SoftmaxState seen_[kTileRows];
    alignas(64) bf16 queries_[kTileRows][kMostHeadDim];
    alignas(64) float totals_[kTileRows][kMostHeadDim];
    alignas(64) float scores_[kTileRows][kStretch];
    alignas(64) bf16 weights_[kTileRows][kStretch];
};

#endif  // RIVULET_TILES

}  // namespace rivulet
