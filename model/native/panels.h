// Weights in panels of 16 outputs: what one vector register holds is 16 outputs x 4 bytes of inputs.
//
// A panel is a run of groups of 32 inputs, a group is
//   4 bits: 4 vectors of nibbles (low: inputs 8j..8j+3, high: 8j+4..8j+7), 16 scales, 16 minima (fp16)
//   8 bits: 8 vectors of bytes (inputs 4j..4j+3), 16 scales, 16 minima (fp16)
//  16 bits: 16 vectors of pairs of bfloat16 (inputs 2j, 2j+1)
// and a weight is scale * u + minimum with u unsigned, or the bfloat16 itself. Panels with zero points have minus
// the zero point in the place of the minimum, a small integer: scale * (u - zero) fits where zero * scale does not.
#pragma once
#include <type_traits>

#include "rows.h"
#include "unrolled.h"

namespace rivulet {

enum class Format : int32_t { kBits4 = 4, kBits8 = 8, kBits16 = 16 };

struct Panels {
    const uint8_t* data;
    int64_t outputs, inputs;
    Format format;
    int32_t zero_points;  // whether they stand in the minima's place

    int64_t group_bytes() const { return int64_t(format) * 64 + (format == Format::kBits16 ? 0 : 64); }
    int64_t panel_bytes() const { return inputs / kGroup * group_bytes(); }
    const uint8_t* panel(int64_t p) const { return data + p * panel_bytes(); }
};

// Write one group of one output: 32 unsigned values, with scale and minimum (or zero point); 4 and 8 bits only.
void write_group(const Panels& panels, int64_t output, int64_t group, const uint8_t* values, fp16 scale, fp16 minimum);
// Write one output's weights: rounded to bfloat16, or quantised by the minimum and the range of each group.
void write_output(const Panels& panels, int64_t output, const float* weights);
// The weights of one output, as the products see them.
void read_output(const Panels& panels, int64_t output, float* weights);

// Where sums begin that are not converted to floats: its bits and those of a sum below 2^22 beside it are the float
// kOffset + sum.
constexpr float kOffset = 3 << 22;

// Weights that will be wanted next: fetched a few lines at a time, while others are multiplied, so that neither memory nor
// arithmetic waits for the other.
struct Ahead {
    const uint8_t *next, *end;
    int lines = 0;  // at a time

    // Fetch the rest in so many times.
    void spread(int64_t times) { lines = next < end ? int((end - next + 64 * times - 1) / (64 * times)) : 0; }
    void fetch() {
        for (int i = 0; i < lines; i++, next += 64) prefetch_from_memory(next);
    }
};

// A group's scales and minima of 16 outputs.
struct Factors {
    Floats scale, minimum;
    Factors(const uint8_t* data, bool zero_points)
        : scale(Floats::load_fp16(reinterpret_cast<const fp16*>(data))),
          minimum(Floats::load_fp16(reinterpret_cast<const fp16*>(data) + kLanes)) {
        if (zero_points) minimum = minimum * scale;  // exact: 11 bits times 9
    }
    // As they were stored by unpacking.
    Factors(const float* scale, const float* minimum) : scale(Floats::load(scale)), minimum(Floats::load(minimum)) {}
    Floats scaled(Ints sum) const { return sum.floats() * scale; }
};

// The same for sums that begin at kOffset. What is taken off is exact (11 bits times 2), so both round alike.
struct OffsetFactors : Factors {
    const Floats offset;
    OffsetFactors(const uint8_t* data, bool zero_points)
        : Factors(data, zero_points), offset(scale * Floats::all(-kOffset)) {}
    OffsetFactors(const float* scale, const float* minimum)
        : Factors(scale, minimum), offset(this->scale * Floats::all(-kOffset)) {}
    Floats scaled(Ints sum) const { return fma(sum.bits_as_floats(), scale, offset); }
};

// The end of a group's work for one row: the scaled sums and the part of the minimum.
inline Floats add_group(Floats scaled, const Factors& weight, float row_scale, float row_sum, Floats total) {
    total = fma(scaled, Floats::all(row_scale), total);
    return fma(weight.minimum, Floats::all(row_sum), total);
}

// The same for M rows by 16 outputs of each of P panels: a group's factors of panel p are factors_of(p), its sums of row m
// sum_of(p, m).
template <int P, int M, typename FactorsOf, typename SumOf>
inline void add_groups(const InputRows& x, int row, int group, FactorsOf factors_of, SumOf sum_of, Floats (&totals)[P][M]) {
    const float *scales = x.row_scales(row) + group, *sums = x.row_sums(row) + group;
    const int groups = x.groups();
    unrolled<P>([&](auto p) {
        const auto factors = factors_of(p);
        unrolled<M>([&](auto m) {
            totals[p][m] = add_group(factors.scaled(sum_of(p, m)), factors, scales[m * groups], sums[m * groups], totals[p][m]);
        });
    });
}

// A row's exact sums of a group by 16 outputs, for inputs of 8 bits or of 16.
template <int Bits, int Planes>
using Sums = std::conditional_t<Planes == 1, ByteSums<Bits>, std::conditional_t<kWords, WordSums, PlaneSums<Bits>>>;

// 16 outputs of M rows by each of P panels, one after the other in memory, for weights of `Bits` bits. An activation that
// was read is used P times. The fp32 additions run over the groups in order.
template <int Bits, int Planes, int P, int M>
inline void multiply_panels(const uint8_t* panel, bool zero_points, const InputRows& x, int row, Ahead& ahead,
                            Floats (&out)[P][M]) {
    constexpr int kWeightBytes = Bits * 64;
    constexpr bool kTwoPlanes = Planes == 2 && !kWords;
    using RowSums = Sums<Bits, Planes>;
    const int groups = x.groups();
    const int64_t stride = groups * int64_t(kWeightBytes + 64);
    const int8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x.row(row + m);
    Floats total[P][M];
    unrolled<P, M>([&](auto p, auto m) { total[p][m] = Floats::zero(); });
    for (int g = 0; g < groups; g++, panel += kWeightBytes + 64) {
        ahead.fetch();
        bool second = false;  // whether any row has something in its second plane here
        if constexpr (kTwoPlanes)
            for (int m = 0; m < M; m++) second = second || !all_zero(rows[m] + x.inputs + g * kGroup);
        RowSums products[P][M];
        if constexpr (RowSums::kCanBeOffset)
            unrolled<P, M>([&](auto p, auto m) { products[p][m] = RowSums{Ints::bits_of(Floats::all(kOffset))}; });
        for (int j = 0; j < Bits; j++) {
            Bytes weights[P];
            const auto add = [&](int i) {
                i += g * kGroup;
                unrolled<P, M>([&](auto p, auto m) { products[p][m].add(weights[p], rows[m], i); });
                if constexpr (kTwoPlanes)
                    if (second)
                        unrolled<P, M>([&](auto p, auto m) { products[p][m].add_second(weights[p], rows[m], i, x.inputs); });
            };
            const auto load = [&](int p) { return Bytes::load(panel + p * stride + j * 64); };
            if constexpr (Bits == 4) {
                unrolled<P>([&](auto p) { weights[p] = load(p).low_nibbles(); });
                add(8 * j);
                unrolled<P>([&](auto p) { weights[p] = load(p).high_nibbles(); });
                add(8 * j + 4);
            } else {
                unrolled<P>([&](auto p) { weights[p] = load(p); });
                add(4 * j);
            }
        }
        using GroupFactors = std::conditional_t<RowSums::kCanBeOffset, OffsetFactors, Factors>;
        add_groups(
            x, row, g, [&](auto p) { return GroupFactors(panel + p * stride + kWeightBytes, zero_points); },
            [&](auto p, auto m) { return products[p][m].ints(); }, total);
    }
    unrolled<P, M>([&](auto p, auto m) { out[p][m] = total[p][m]; });
}

// The same for weights in bfloat16: two sums a row, of the even and of the odd pairs, hide the latency.
template <int Planes, int M>
inline void multiply_bf16_panel(const uint8_t* panel, const InputRows& x, int row, Floats (&out)[M]) {
    const bf16* weights = reinterpret_cast<const bf16*>(panel);
    const bf16* halves = x.row_halves(row);
    Floats even[M], odd[M];
    for (int m = 0; m < M; m++) even[m] = odd[m] = Floats::zero();
    for (int i = 0; i < x.inputs; i += 4, weights += 4 * kLanes)
        for (int m = 0; m < M * Planes; m++) {
            const bf16* pairs = halves + int64_t(m) * x.inputs + i;
            even[m / Planes] = dot(even[m / Planes], Pairs::load(weights), Pairs::all(pairs));
            odd[m / Planes] = dot(odd[m / Planes], Pairs::load(weights + 2 * kLanes), Pairs::all(pairs + 2));
        }
    for (int m = 0; m < M; m++) out[m] = even[m] + odd[m];
}

// A block of `count` rows, M at most, by P panels: `product(row, outputs)` computes it, `each(p, row, outputs)` gets the 16
// outputs of a row by a panel.
template <int P, int M, typename Product, typename Each>
void multiply_block(int row, int count, Product product, Each each) {
    if constexpr (M > 1)
        if (count < M) return multiply_block<P, M - 1>(row, count, product, each);
    Floats outputs[P][M];
    product(row, outputs);
    for (int p = 0; p < P; p++)
        for (int m = 0; m < M; m++) each(p, row + m, outputs[p][m]);
}

// Rows from `row` to `end` by P panels, in blocks as even as can be: a small one at the end costs nearly as much as a large one.
template <int P, int M, typename Product, typename Each>
void multiply_blocks(int row, int end, Product product, Each each) {
    for (int blocks = int(divide_up(end - row, M)); blocks > 0; blocks--) {
        const int count = int(divide_up(end - row, blocks));
        multiply_block<P, M>(row, count, product, each);
        row += count;
    }
}

}  // namespace rivulet
