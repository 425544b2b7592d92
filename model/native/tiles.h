// Products for many rows by AMX's tiles: 16 rows x 16 outputs x 32 inputs an instruction.
//
// The integer sums are those of panels.h, and scaled in the same order, so a row's result has the same bits
// whether it was computed here or there. Builds without AMX compile to nothing; RIVULET_MODEL_OF_TILES gives the
// instructions' meaning in plain C++, by which the tests run this file on any processor.
#pragma once
#include <vector>

#include "panels.h"

namespace rivulet {

constexpr int kTileRows = 16;

#if defined(__AMX_INT8__)
constexpr bool kTiles = true;

// The tiles of this thread, set up for as long as the object lives. 0 and 1: sums, 2 and 3: rows, 4 and 5: weights.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, kGroup, kGroup, 64, 64};
            uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kGroup / 4, kGroup / 4};
        } config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;

    // sums[16][16] = rows[16][32 of `stride`] x weights[8][16][4]; `Pair` chooses the tiles, so that two can overlap.
    template <int Pair>
    static void multiply(const int8_t* rows, int64_t stride, const uint8_t* weights, int32_t* sums) {
        if constexpr (Pair == 0) {
            _tile_zero(0);
            _tile_loadd(2, rows, stride);
            _tile_loadd(4, weights, 64);
            _tile_dpbsud(0, 2, 4);
            _tile_stored(0, sums, 64);
        } else {
            _tile_zero(1);
            _tile_loadd(3, rows, stride);
            _tile_loadd(5, weights, 64);
            _tile_dpbsud(1, 3, 5);
            _tile_stored(1, sums, 64);
        }
    }
};

#elif defined(RIVULET_MODEL_OF_TILES)
constexpr bool kTiles = true;

struct Tiles {
    template <int Pair>
    static void multiply(const int8_t* rows, int64_t stride, const uint8_t* weights, int32_t* sums) {
        for (int r = 0; r < kTileRows; r++)
            for (int lane = 0; lane < kLanes; lane++) {
                int32_t sum = 0;
                for (int i = 0; i < kGroup; i++) sum += rows[r * stride + i] * weights[i / 4 * 64 + lane * 4 + i % 4];
                sums[r * kLanes + lane] = sum;
            }
    }
};

#else
constexpr bool kTiles = false;
#endif

// As many tiles of rows as there are, if it is at least two; gives the first row that is left.
template <int Bits, int Planes, typename Each>
int multiply_tiles(const uint8_t* panel, bool zero_points, const InputRows& x, int row, int end, Each each) {
#if defined(__AMX_INT8__) || defined(RIVULET_MODEL_OF_TILES)
    constexpr int kRows = kTileRows / Planes;
    if (end - row < 2 * kRows) return row;  // fewer do not pay for setting the tiles up
    constexpr int kWeightBytes = Bits * 64;
    const int groups = x.groups();
    const uint8_t* weights = panel;
    int64_t weights_stride = kWeightBytes + 64;
    if constexpr (Bits == 4) {  // unpacked once for all rows
        thread_local std::vector<uint8_t> unpacked;
        unpacked.resize(size_t(groups) * 512);
        for (int g = 0; g < groups; g++)
            for (int j = 0; j < 4; j++) {
                const Bytes packed = Bytes::load(panel + g * weights_stride + j * 64);
                packed.low_nibbles().store(&unpacked[size_t(g) * 512 + size_t(j) * 128]);
                packed.high_nibbles().store(&unpacked[size_t(g) * 512 + size_t(j) * 128 + 64]);
            }
        weights = unpacked.data();
        weights_stride = 512;
    }
    const Tiles tiles;
    alignas(64) int32_t sums[2][kTileRows * kLanes];
    for (; row + kRows <= end; row += kRows) {
        Floats total[kRows];
        for (Floats& t : total) t = Floats::zero();
        auto scale = [&](int g) {
            const Factors factors(panel + g * (kWeightBytes + 64) + kWeightBytes, zero_points);
            Ints tile[kTileRows];
            for (int m = 0; m < kTileRows; m++) tile[m] = Ints::load(sums[g % 2] + m * kLanes);
            for (int m = 0; m < kRows; m++) {
                const Ints sum = Planes == 2 ? joined(tile[2 * m], tile[2 * m + 1]) : tile[m];
                total[m] = add_group(factors.scaled(sum), factors, x.row_scales(row + m)[g], x.row_sums(row + m)[g],
                                     total[m]);
            }
        };
        for (int g = 0; g < groups; g += 2) {
            const int8_t* values = x.row(row) + g * kGroup;
            tiles.multiply<0>(values, x.inputs, weights + g * weights_stride, sums[0]);
            if (g + 1 < groups)
                tiles.multiply<1>(values + kGroup, x.inputs, weights + (g + 1) * weights_stride, sums[1]);
            scale(g);
            if (g + 1 < groups) scale(g + 1);
        }
        for (int m = 0; m < kRows; m++) each(row + m, total[m]);
    }
#endif
    return row;
}

}  // namespace rivulet
