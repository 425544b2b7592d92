// Products of panels with any number of rows, and the gate's activations: what linear.cpp and experts.cpp cut into tasks.
#pragma once
#include "cache_ahead.h"
#include "panels.h"
#include "tile_products.h"
#include "winograd_products.h"

namespace rivulet {

// The rows of a task: their activations stay in the second-level cache, a panel's weights in the first.
#if defined(RIVULET_TILES)
constexpr int kTaskRows = 256;  // tiles unpack the weights once for all of them
#else
constexpr int kTaskRows = 128;
#endif

// How often a product of so many rows by kPanelBlock panels looks at what is to be fetched.
inline int64_t pieces(const InputRows& in, int rows) {
#if defined(RIVULET_TILES)
    if (rows * in.planes >= kLeastTileRows)
        return divide_up(rows * in.planes, kTileRows) * divide_up(in.groups(), kTileGroups);
#endif
    return divide_up(rows, row_block(in.planes));
}

template <int Bits, int P, int Planes, typename Each>
void multiply_rows(const Panels& weight, int64_t first, const InputRows& in, int row, int end, CacheAhead& cache,
                   Each each) {
    Ahead ahead{weight.panel(first + P), weight.panel(first + 2 * P)};
#if defined(RIVULET_TILES)
    if constexpr (P == 2 && Bits != 16)
        if ((end - row) * Planes >= kLeastTileRows)
            return multiply_tiles<Bits, Planes>(weight.panel(first), weight.zero_points, in, row, end, ahead, cache, each);
#endif
    constexpr int kBlock = row_block(Planes);
    const int64_t blocks = divide_up(end - row, kBlock);
    ahead.spread(blocks * in.groups());
    const uint8_t* panel = weight.panel(first);
#if defined(RIVULET_WINOGRAD)
    if constexpr (Bits == 4 && Planes == 1)
        if (end - row >= kLeastWinogradRows)
            return multiply_by_pairs<P, kTaskRows>(panel, weight.zero_points, in, row, end, ahead, cache, each);
#endif
    multiply_blocks<P, kBlock>(
        row, end,
        [&](int m, auto& outputs) {
            if constexpr (Planes == 1) cache.fetch();  // logits have two: no attention comes after, and asking costs them 40 %
            if constexpr (Bits == 16)
                for (int p = 0; p < P; p++)
                    multiply_bf16_panel<Planes>(panel + p * in.inputs * int64_t(2 * kLanes), in, m, outputs[p]);
            else
                multiply_panels<Bits, Planes>(panel, weight.zero_points, in, m, ahead, outputs);
        },
        each);
}

template <int Bits, int P, typename Each>
void multiply_rows(const Panels& weight, int64_t first, const InputRows& in, int row, int end, CacheAhead& cache,
                   Each each) {
    const auto from_first = [&](int p, int r, Floats y) { each(first + p, r, y); };
    if (in.planes == 2)
        multiply_rows<Bits, P, 2>(weight, first, in, row, end, cache, from_first);
    else
        multiply_rows<Bits, P, 1>(weight, first, in, row, end, cache, from_first);
}

template <int Bits, typename Each>
void multiply_rows(const Panels& weight, int64_t first, int64_t last, const InputRows& in, int row, int end,
                   CacheAhead& cache, Each each) {
    for (; first + kPanelBlock <= last; first += kPanelBlock)
        multiply_rows<Bits, kPanelBlock>(weight, first, in, row, end, cache, each);
    if constexpr (kPanelBlock > 1)
        for (; first < last; first++) multiply_rows<Bits, 1>(weight, first, in, row, end, cache, each);
}

// Rows from `row` to `end` by the panels from `first` to `last`: `each(panel, row, outputs)` gets 16 outputs. Meanwhile
// `cache` is fetched, a piece for each block of panels and rows.
template <typename Each>
void multiply_rows(const Panels& weight, int64_t first, int64_t last, const InputRows& in, int row, int end,
                   CacheAhead& cache, Each each) {
    switch (weight.format) {
        case Format::kBits4: return multiply_rows<4>(weight, first, last, in, row, end, cache, each);
        case Format::kBits8: return multiply_rows<8>(weight, first, last, in, row, end, cache, each);
        case Format::kBits16: return multiply_rows<16>(weight, first, last, in, row, end, cache, each);
    }
}

enum class Activation : int32_t { kSilu = 0, kGelu = 1 };

// 1 / (1 + e^-x), by e to the minus |x|, which cannot overflow.
inline Floats sigmoid(Floats x) {
    const Floats e = exp(Floats::zero() - abs(x)), one = Floats::all(1.0f);
    return select_negative(x, e, one) / (one + e);
}

// silu(x) = x * sigmoid(x). GELU in its tanh form (arXiv:1606.08415): (1 + tanh(u)) / 2 = sigmoid(2 u) with
// u = sqrt(2 / pi) * (x + 0.044715 * x^3).
inline Floats activate(Activation activation, Floats x) {
    if (activation == Activation::kSilu) return x * sigmoid(x);
    const Floats inner = fma(x * x * x, Floats::all(0.044715f), x);
    return x * sigmoid(inner * Floats::all(1.5957691216f));
}

// A group of `out` for rows from `first` to `end`, kTaskRows at most: activation(gate) * up, neither of which
// leaves the cache.
inline void gate_group(const Panels& gate, const Panels& up, const InputRows& in, Activation activation,
                       const InputRows& out, int64_t group, int first, int end, CacheAhead& cache) {
    Floats gates[2][kTaskRows], ups[2][kTaskRows];
    const int64_t start = 2 * group;
    multiply_rows(gate, start, start + 2, in, first, end, cache,
                  [&](int64_t panel, int row, Floats y) { gates[panel - start][row - first] = y; });
    multiply_rows(up, start, start + 2, in, first, end, cache,
                  [&](int64_t panel, int row, Floats y) { ups[panel - start][row - first] = y; });
    for (int row = first; row < end; row++) {
        const int i = row - first;
        write_group(activate(activation, gates[0][i]) * ups[0][i], activate(activation, gates[1][i]) * ups[1][i], out,
                    row, int(group));
    }
}

}  // namespace rivulet
