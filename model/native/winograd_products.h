// Products of 4-bit panels with many rows by Winograd's inner product (winograd.h).
//
// The integer sums are those of panels.h, and scaled in the same order, so a row's result has the same bits whether it was
// computed here or there.
#pragma once
#include "cache_ahead.h"
#include "panels.h"

namespace rivulet {

#if defined(RIVULET_WINOGRAD)

// Fewer rows do not pay for unpacking the weights.
constexpr int kLeastWinogradRows = 32;
// A group's weights in a panel, before its scales and minima.
constexpr int kNibbleBytes = 4 * 64;

// A group of a panel as pairs take it in.
struct WinogradGroup {
    alignas(64) uint8_t weights[kGroup * kLanes];  // in turn the first four of each 8 inputs, and the second four
    int32_t start[kLanes];                         // where the sums begin, but for the row's part
    float scale[kLanes], minimum[kLanes];

    WinogradGroup() {}  // it need not be anything before it is unpacked
    void unpack(const uint8_t* group, bool zero_points) {
        Ints own = Ints::zero();
        for (int j = 0; j < 4; j++) {
            const Bytes both = Bytes::load(group + j * 64);
            const Bytes first = both.low_nibbles() + Bytes::all(kFirstOffset);
            const Bytes second = both.high_nibbles() + Bytes::all(kSecondOffset);
            first.store(weights + j * 128);
            second.store(weights + j * 128 + 64);
            own = dot(own, second, first);
        }
        (Ints::bits_of(Floats::all(kOffset)) - own).store(start);
        const Factors factors(group + kNibbleBytes, zero_points);
        factors.scale.store(scale);
        factors.minimum.store(minimum);
    }
};

// Some groups of P panels, in turn, that stay in the first-level cache while all rows of a task are multiplied by them.
template <int P>
class WinogradPiece {
  public:
    static constexpr int kGroups = 18;

    WinogradPiece(const uint8_t* panel, bool zero_points, const InputRows& x, int first, int end)
        : x_(x), first_(first), end_(end) {
        constexpr int kGroupBytes = kNibbleBytes + 64;
        for (int p = 0; p < P; p++, panel += x.groups() * int64_t(kGroupBytes))
            for (int g = first; g < end; g++) weights_[(g - first) * P + p].unpack(panel + g * kGroupBytes, zero_points);
    }

    // Add the groups to the totals of M rows.
    template <int M>
    void multiply(int row, Ahead& ahead, Floats (&totals)[P][M]) const {
        const int groups = x_.groups();
        const int8_t* rows[M] = {x_.row(row)};
        for (int m = 1; m < M; m++) rows[m] = rows[m - 1] + x_.inputs;
        const int32_t* parts = x_.row_parts(row);
        const WinogradGroup* weights = weights_;
        Floats total[P][M];
        unrolled<P, M>([&](auto p, auto m) { total[p][m] = totals[p][m]; });
        for (int g = first_; g < end_; g++, weights += P) {
            ahead.fetch();
            Ints sums[P][M];
            unrolled<P, M>(
                [&](auto p, auto m) { sums[p][m] = Ints::load(weights[p].start) + Ints::all(parts[m * groups + g]); });
            unrolled<4>([&](auto j) {
                Bytes first[P], second[P];
                unrolled<P>([&](auto p) {
                    first[p] = Bytes::load(weights[p].weights + j * 128).kept();
                    second[p] = Bytes::load(weights[p].weights + j * 128 + 64).kept();
                });
                unrolled<M>([&](auto m) {
                    const int8_t* eight = rows[m] + g * kGroup + j * 8;
                    const Bytes x1 = Bytes::four(eight), x2 = Bytes::four(eight + 4);
                    unrolled<P>([&](auto p) { sums[p][m] = dot(sums[p][m], x1 + second[p], x2 + first[p]); });
                });
            });
            add_groups(
                x_, row, g, [&](auto p) { return OffsetFactors(weights[p].scale, weights[p].minimum); },
                [&](auto p, auto m) { return sums[p][m]; }, total);
        }
        unrolled<P, M>([&](auto p, auto m) { totals[p][m] = total[p][m]; });
    }

  private:
    const InputRows& x_;
    const int first_, end_;
    WinogradGroup weights_[P * kGroups];
};

// Rows from `first_row` to `end_row`, MostRows at most, by P panels of 4 bits, a piece of their groups after the other.
template <int P, int MostRows, typename Each>
void multiply_by_pairs(const uint8_t* panel, bool zero_points, const InputRows& in, int first_row, int end_row, Ahead& ahead,
                       CacheAhead& cache, Each each) {
    using Piece = WinogradPiece<P>;
    const int groups = in.groups();
    Floats totals[P][MostRows];  // of the pieces before
    for (int start = 0, end; start < groups; start = end) {
        end = start + int(divide_up(groups - start, divide_up(groups - start, Piece::kGroups)));
        const Piece piece(panel, zero_points, in, start, end);
        multiply_blocks<P, row_block(1)>(
            first_row, end_row,
            [&](int row, auto& outputs) {
                constexpr int M = std::extent_v<std::remove_reference_t<decltype(outputs)>, 1>;
                if (start == 0) cache.fetch();  // once for each block of rows, as by other products
                unrolled<P, M>([&](auto p, auto m) {
                    outputs[p][m] = start == 0 ? Floats::zero() : totals[p][row + m - first_row];
                });
                piece.multiply(row, ahead, outputs);
            },
            [&](int p, int row, Floats y) {
                if (end < groups)
                    totals[p][row - first_row] = y;
                else
                    each(p, row, y);
            });
    }
}

#endif  // RIVULET_WINOGRAD

}  // namespace rivulet
