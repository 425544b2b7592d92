// Products of panels with any number of rows, and the gate's activations: what linear.cpp and experts.cpp cut into tasks.
#pragma once
#include "panels.h"
#include "tiles.h"

namespace rivulet {

// A tile of rows: its activations stay in the second-level cache, a panel's weights in the first.
constexpr int kTaskRows = 128;

inline int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }

// 16 outputs of M rows.
template <int Bits, int M, int Planes>
void multiply(const uint8_t* panel, bool zero_points, const InputRows& in, int row, Floats* outputs) {
    if constexpr (Bits == 16)
        multiply_bf16_panel<M, Planes>(panel, in, row, outputs);
    else
        multiply_panel<Bits, M, Planes>(panel, zero_points, in, row, outputs);
}

// As many times M rows as there are: `each(row, outputs)` gets the 16 outputs of a row.
template <int Bits, int M, int Planes, typename Each>
int multiply_blocks(const uint8_t* panel, bool zero_points, const InputRows& in, int row, int end, Each each) {
    Floats outputs[M];
    for (; row + M <= end; row += M) {
        multiply<Bits, M, Planes>(panel, zero_points, in, row, outputs);
        for (int m = 0; m < M; m++) each(row + m, outputs[m]);
    }
    return row;
}

template <int Bits, int Planes, typename Each>
void multiply_rows(const Panels& weight, int64_t p, const InputRows& in, int row, int end, Each each) {
    constexpr int kBlock = kRowBlock / Planes;
    const uint8_t* panel = weight.panel(p);
    const bool zero = weight.zero_points;
    if constexpr (kTiles && Bits != 16) row = multiply_tiles<Bits, Planes>(panel, zero, in, row, end, each);
    row = multiply_blocks<Bits, kBlock, Planes>(panel, zero, in, row, end, each);
    if constexpr (kBlock > 4) row = multiply_blocks<Bits, 4, Planes>(panel, zero, in, row, end, each);
    if constexpr (kBlock > 2) row = multiply_blocks<Bits, 2, Planes>(panel, zero, in, row, end, each);
    if constexpr (kBlock > 1) multiply_blocks<Bits, 1, Planes>(panel, zero, in, row, end, each);
}

template <int Bits, typename Each>
void multiply_rows(const Panels& weight, int64_t p, const InputRows& in, int row, int end, Each each) {
    if (in.planes == 2)
        multiply_rows<Bits, 2>(weight, p, in, row, end, each);
    else
        multiply_rows<Bits, 1>(weight, p, in, row, end, each);
}

// 16 outputs, those of one panel, of rows from `row` to `end`.
template <typename Each>
void multiply_rows(const Panels& weight, int64_t panel, const InputRows& in, int row, int end, Each each) {
    switch (weight.format) {
        case Format::kBits4: return multiply_rows<4>(weight, panel, in, row, end, each);
        case Format::kBits8: return multiply_rows<8>(weight, panel, in, row, end, each);
        case Format::kBits16: return multiply_rows<16>(weight, panel, in, row, end, each);
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
                       const InputRows& out, int64_t group, int first, int end) {
    Floats gates[2][kTaskRows], ups[2][kTaskRows];
    for (int half = 0; half < 2; half++) {
        multiply_rows(gate, 2 * group + half, in, first, end, [&](int row, Floats y) { gates[half][row - first] = y; });
        multiply_rows(up, 2 * group + half, in, first, end, [&](int row, Floats y) { ups[half][row - first] = y; });
    }
    for (int row = first; row < end; row++) {
        const int i = row - first;
        write_group(activate(activation, gates[0][i]) * ups[0][i], activate(activation, gates[1][i]) * ups[1][i], out,
                    row, int(group));
    }
}

}  // namespace rivulet
