// Weights in panels of 16 outputs: what one vector register holds is 16 outputs x 4 bytes of inputs.
//
// A panel is a run of groups of 32 inputs, a group is
//   4 bits: 4 vectors of nibbles (low: inputs 8j..8j+3, high: 8j+4..8j+7), 16 scales, 16 minima (fp16)
//   8 bits: 8 vectors of bytes (inputs 4j..4j+3), 16 scales, 16 minima (fp16)
// and a weight is scale * u + minimum with u unsigned.
#pragma once
#include "rows.h"

namespace rivulet {

enum class Format : int32_t { kBits4 = 4, kBits8 = 8 };

struct Panels {
    const uint8_t* data;
    int64_t outputs, inputs;
    Format format;

    int64_t panel_bytes() const { return inputs / kGroup * (int64_t(format) * 64 + 64); }
    const uint8_t* panel(int64_t p) const { return data + p * panel_bytes(); }
};

// Write one group of one output: 32 unsigned values, with scale and minimum.
void write_group(const Panels& panels, int64_t output, int64_t group, const uint8_t* values, fp16 scale, fp16 minimum);
// Quantise one output's weights by the minimum and the range of each group.
void quantise_output(const Panels& panels, int64_t output, const float* weights);
// The weights of one output, as the products see them.
void read_output(const Panels& panels, int64_t output, float* weights);

// 16 outputs of M rows, for weights of `Bits` bits. The fp32 additions run over the groups in order.
template <int Bits, int M>
inline void multiply_panel(const uint8_t* panel, const QuantisedRows& x, int row, Floats* out) {
    constexpr int kWeightBytes = Bits * 64;
    const int groups = x.groups();
    const int8_t* q = x.row(row);
    const float *scales = x.row_scales(row), *sums = x.row_sums(row);
    Floats total[M];
    for (int m = 0; m < M; m++) total[m] = Floats::zero();
    for (int g = 0; g < groups; g++, panel += kWeightBytes + 64) {
        Ints products[M];
        for (int m = 0; m < M; m++) products[m] = Ints::zero();
        for (int j = 0; j < Bits; j++) {
            const Bytes packed = Bytes::load(panel + j * 64);
            if constexpr (Bits == 4) {
                const Bytes low = packed.low_nibbles(), high = packed.high_nibbles();
                for (int m = 0; m < M; m++) {
                    const int8_t* four = q + int64_t(m) * x.inputs + g * kGroup + j * 8;
                    products[m] = dot(products[m], low, four);
                    products[m] = dot(products[m], high, four + 4);
                }
            } else {
                for (int m = 0; m < M; m++)
                    products[m] = dot(products[m], packed, q + int64_t(m) * x.inputs + g * kGroup + j * 4);
            }
        }
        const fp16* factors = reinterpret_cast<const fp16*>(panel + kWeightBytes);
        const Floats scale = Floats::load_fp16(factors), minimum = Floats::load_fp16(factors + 16);
        for (int m = 0; m < M; m++) {
            total[m] = fma(products[m].floats() * scale, Floats::all(scales[m * groups + g]), total[m]);
            total[m] = fma(minimum, Floats::all(sums[m * groups + g]), total[m]);
        }
    }
    for (int m = 0; m < M; m++) out[m] = total[m];
}

}  // namespace rivulet
