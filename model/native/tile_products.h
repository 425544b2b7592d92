// Products of panels with many rows by tiles: 16 rows x 16 outputs x 32 inputs an instruction.
//
// The integer sums are those of panels.h, and scaled in the same order, so a row's result has the same bits whether it was
// computed here or there.
#pragma once
#include <algorithm>
#include <vector>

#include "cache_ahead.h"
#include "panels.h"
#include "tiles.h"

namespace rivulet {

#if defined(RIVULET_TILES)

// Fewer rows, or planes of them, do not pay for unpacking the weights.
constexpr int kLeastTileRows = 40;
// Tiles multiply so many groups, then vectors scale them: processors with AMX give vectors half of their speed while tiles
// are busy and for some hundred cycles after. More groups would leave the first-level cache.
constexpr int kTileGroups = 6;

// A group of a panel as tiles take it in.
struct TileGroup {
    alignas(64) uint8_t weights[kGroup * kLanes];
    float scale[kLanes], minimum[kLanes];
    Factors factors() const { return {scale, minimum}; }
};

// Write each group of a panel to every P-th of `out`.
template <int Bits, int P>
void unpack(const uint8_t* panel, bool zero_points, int groups, TileGroup* out) {
    constexpr int kWeightBytes = Bits * 64;
    for (int g = 0; g < groups; g++, panel += kWeightBytes + 64, out += P) {
        for (int j = 0; j < Bits; j++) {
            const Bytes weights = Bytes::load(panel + j * 64);
            if constexpr (Bits == 4) {
                weights.low_nibbles().store(out->weights + j * 128);
                weights.high_nibbles().store(out->weights + j * 128 + 64);
            } else {
                weights.store(out->weights + j * 64);
            }
        }
        const Factors factors(panel + kWeightBytes, zero_points);
        factors.scale.store(out->scale);
        factors.minimum.store(out->minimum);
    }
}

// Two panels, group by group in turn, and up to 16 rows or planes of them.
template <int Planes>
class TileBlock {
  public:
    static constexpr int kRows = kTileRows / Planes;

    TileBlock(const TileGroup* weights, const InputRows& x, int row, int count, Ahead& ahead, CacheAhead& cache)
        : weights_(weights), x_(x), row_(row), ahead_(ahead) {
        const int groups = x.groups();
        for (int start = 0; start < groups; start += kTileGroups) {
            const int end = std::min(start + kTileGroups, groups);
            if constexpr (Planes == 1) cache.fetch();
            multiply(start, end);
            const int half = count > kMost ? (count + 1) / 2 : count;
            scale<kMost>(0, half, start, end);
            if (half < count) scale<kMost>(half, count - half, start, end);
        }
    }
    Floats output(int panel, int m) const { return Floats::load(totals_[m][panel]); }

    static Tiles tiles(int count) {
        const int rows = count * Planes;
        const TileShape sums{rows, kTileBytes}, inputs{rows, kGroup}, weights{kGroup / 4, kTileBytes};
        return Tiles({sums, sums, sums, sums, inputs, inputs, weights, weights});
    }

  private:
    static constexpr int kMost = 8;  // rows by two panels, whose sums are in registers together

    // One group's sums by the first panel and by the second, in tiles that the group before does not use.
    template <int Parity, int Panel>
    void multiply(int group) {
        constexpr int kSums = 2 * Parity + Panel, kInputs = 4 + Parity, kWeights = 6 + Panel;
        Tiles::zero<kSums>();
        if constexpr (Panel == 0) Tiles::load<kInputs>(x_.row(row_) + group * kGroup, x_.inputs);
        Tiles::load<kWeights>(weights_[2 * group + Panel].weights, kTileBytes);
        Tiles::multiply_bytes<kSums, kInputs, kWeights>();
    }
    template <int Parity, int Panel>
    void store(int place) {
        Tiles::store<2 * Parity + Panel>(sums_[place][Panel], kTileBytes);
    }
    // A sum is stored two products after its own, which takes as long.
    void multiply(int start, int end) {
        for (int g = start; g < end; g += 2) {
            ahead_.fetch();
            multiply<0, 0>(g);
            if (g > start) store<1, 0>(g - 1 - start);
            multiply<0, 1>(g);
            if (g > start) store<1, 1>(g - 1 - start);
            if (g + 1 < end) multiply<1, 0>(g + 1);
            store<0, 0>(g - start);
            if (g + 1 < end) multiply<1, 1>(g + 1);
            store<0, 1>(g - start);
        }
        if ((end - start) % 2 == 0) {
            store<1, 0>(end - 1 - start);
            store<1, 1>(end - 1 - start);
        }
    }

    // Add the groups to the totals of `count` rows, M at most.
    template <int M>
    void scale(int first, int count, int start, int end) {
        if constexpr (M > 1)
            if (count < M) return scale<M - 1>(first, count, start, end);
        const int groups = x_.groups();
        const float *scales = x_.row_scales(row_ + first), *sums = x_.row_sums(row_ + first);
        Floats total[2][M];
        unrolled<2 * M>([&](auto i) {
            total[i / M][i % M] = start == 0 ? Floats::zero() : Floats::load(totals_[first + i % M][i / M]);
        });
        for (int g = start; g < end; g++) {
            const Factors factors[2] = {weights_[2 * g].factors(), weights_[2 * g + 1].factors()};
            unrolled<2 * M>([&](auto i) {
                constexpr int p = i % 2, m = i / 2;
                const int32_t* tile = sums_[g - start][p][(first + m) * Planes];
                const Ints sum = Planes == 2 ? joined(Ints::load(tile), Ints::load(tile + kLanes)) : Ints::load(tile);
                total[p][m] = add_group(factors[p].scaled(sum), factors[p], scales[m * groups + g],
                                        sums[m * groups + g], total[p][m]);
            });
        }
        unrolled<2 * M>([&](auto i) { total[i / M][i % M].store(totals_[first + i % M][i / M]); });
    }

    const TileGroup* weights_;
    const InputRows& x_;
    const int row_;
    Ahead& ahead_;
    alignas(64) int32_t sums_[kTileGroups][2][kTileRows][kLanes];
    alignas(64) float totals_[kRows][2][kLanes];
};

// Rows from `row` to `end` by two panels, one after the other in memory: each(panel, row, outputs). The caller asks
// whether it pays (kLeastTileRows).
template <int Bits, int Planes, typename Each>
void multiply_tiles(const uint8_t* panel, bool zero_points, const InputRows& x, int row, int end, Ahead& ahead,
                    CacheAhead& cache, Each each) {
    const int groups = x.groups();
    thread_local std::vector<TileGroup> unpacked;
    if (unpacked.size() < size_t(2 * groups)) unpacked.resize(size_t(2 * groups));
    for (int p = 0; p < 2; p++)
        unpack<Bits, 2>(panel + p * int64_t(groups) * (Bits * 64 + 64), zero_points, groups, &unpacked[p]);
    // Blocks of one size, for which the tiles are shaped once; where it does not divide the rows, some are computed again.
    using Block = TileBlock<Planes>;
    const int blocks = int(divide_up(end - row, Block::kRows)), count = int(divide_up(end - row, blocks));
    const Tiles tiles = Block::tiles(count);
    ahead.spread(blocks * divide_up(groups, 2));
    for (int first = row; row < end; first += count) {
        const int start = std::min(first, end - count);
        const Block block(unpacked.data(), x, start, count, ahead, cache);
        for (; row < start + count; row++)
            for (int p = 0; p < 2; p++) each(p, row, block.output(p, row - start));
    }
}

#endif  // RIVULET_TILES

}  // namespace rivulet
