// Filling panels from stored blocks, and reading single outputs back (the embedding).
#include "panels.h"

#include <cmath>

namespace rivulet {
namespace {

fp16 to_fp16(float x) { return _cvtss_sh(x, 0); }
float from_fp16(fp16 x) { return _cvtsh_ss(x); }

// Where the byte of (lane, input) of a group lies.
int byte_of(int bits, int lane, int i) {
    return bits == 4 ? i / 8 * 64 + lane * 4 + i % 4 : i / 4 * 64 + lane * 4 + i % 4;
}

uint8_t* group_of(const Panels& panels, int64_t output, int64_t group) {
    return const_cast<uint8_t*>(panels.panel(output / kLanes)) + group * panels.group_bytes();
}

// Where a weight in bfloat16 lies.
bf16* half_of(const Panels& panels, int64_t output, int64_t i) {
    bf16* panel = reinterpret_cast<bf16*>(const_cast<uint8_t*>(panels.panel(output / kLanes)));
    return panel + i / 2 * 2 * kLanes + output % kLanes * 2 + i % 2;
}

template <int Bits>
void write_group(const Panels& panels, int64_t output, int64_t group, const uint8_t* values, fp16 scale, fp16 minimum) {
    uint8_t* data = group_of(panels, output, group);
    const int lane = int(output % kLanes);
    for (int i = 0; i < kGroup; i += Bits == 4 ? 8 : 4) {  // the four bytes of a lane at once
        uint32_t four, next;
        std::memcpy(&four, values + i, 4);
        if (Bits == 4) {
            std::memcpy(&next, values + i + 4, 4);
            four |= next << 4;
        }
        std::memcpy(data + byte_of(Bits, lane, i), &four, 4);
    }
    fp16* factors = reinterpret_cast<fp16*>(data + Bits * 64);
    factors[lane] = scale;
    factors[kLanes + lane] = minimum;
}

// Q4_0: fp16 scale, 16 bytes (low nibble: weight i, high: i + 16), w = scale * (u - 8). Q4_1: fp16 scale, fp16
// minimum, 16 bytes, w = scale * u + minimum. Q8_0: fp16 scale, 32 signed bytes. All keep their exact values:
// -8 and -128 times a scale only change its exponent.
template <int Kind>
void repack(const Panels& panels, int64_t first, int64_t count, const uint8_t* blocks) {
    constexpr int kFactorBytes = Kind == 3 ? 4 : 2, kBlockBytes = kFactorBytes + (Kind == 8 ? 32 : 16);
    const int64_t groups = panels.inputs / kGroup;
    for (int64_t i = 0; i < count; i++)
        for (int64_t g = 0; g < groups; g++, blocks += kBlockBytes) {
            fp16 scale, minimum;
            uint8_t values[kGroup];
            std::memcpy(&scale, blocks, 2);
            if (Kind == 3)
                std::memcpy(&minimum, blocks + 2, 2);
            else
                minimum = to_fp16(from_fp16(scale) * (Kind == 2 ? -8.0f : -128.0f));
            const uint8_t* data = blocks + kFactorBytes;
            if (Kind == 8)
                for (int j = 0; j < kGroup; j++) values[j] = data[j] ^ 0x80;
            else
                for (int j = 0; j < kGroup / 2; j++) {
                    values[j] = data[j] & 15;
                    values[j + kGroup / 2] = data[j] >> 4;
                }
            write_group<Kind == 8 ? 8 : 4>(panels, first + i, g, values, scale, minimum);
        }
}

}  // namespace

void write_group(const Panels& panels, int64_t output, int64_t group, const uint8_t* values, fp16 scale, fp16 minimum) {
    if (panels.format == Format::kBits4) return write_group<4>(panels, output, group, values, scale, minimum);
    write_group<8>(panels, output, group, values, scale, minimum);
}

void write_output(const Panels& panels, int64_t output, const float* weights) {
    if (panels.format == Format::kBits16) {
        for (int64_t i = 0; i < panels.inputs; i++) *half_of(panels, output, i) = to_bf16(weights[i]);
        return;
    }
    const float most = panels.format == Format::kBits4 ? 15.0f : 255.0f;
    for (int64_t g = 0; g < panels.inputs / kGroup; g++) {
        const float* w = weights + g * kGroup;
        float low = w[0], high = w[0];
        for (int i = 1; i < kGroup; i++) {
            low = std::fmin(low, w[i]);
            high = std::fmax(high, w[i]);
        }
        const fp16 scale = to_fp16((high - low) / most), minimum = to_fp16(low);
        const float step = from_fp16(scale), start = from_fp16(minimum);
        uint8_t values[kGroup];
        for (int i = 0; i < kGroup; i++) {
            const float u = step > 0 ? std::nearbyint((w[i] - start) / step) : 0.0f;
            values[i] = uint8_t(std::fmin(std::fmax(u, 0.0f), most));
        }
        write_group(panels, output, g, values, scale, minimum);
    }
}

void read_output(const Panels& panels, int64_t output, float* weights) {
    if (panels.format == Format::kBits16) {
        for (int64_t i = 0; i < panels.inputs; i++) weights[i] = to_float(*half_of(panels, output, i));
        return;
    }
    const int lane = int(output % kLanes), bits = int(panels.format);
    for (int64_t g = 0; g < panels.inputs / kGroup; g++) {
        const uint8_t* data = group_of(panels, output, g);
        const fp16* factors = reinterpret_cast<const fp16*>(data + bits * 64);
        const float scale = from_fp16(factors[lane]), minimum = from_fp16(factors[kLanes + lane]);
        for (int i = 0; i < kGroup; i++) {
            int u = data[byte_of(bits, lane, i)];
            if (bits == 4) u = i % 8 < 4 ? u & 15 : u >> 4;
            weights[g * kGroup + i] = panels.zero_points ? scale * (float(u) + minimum) : scale * float(u) + minimum;
        }
    }
}

}  // namespace rivulet

// The plain C interface to filling and reading panels. `format` of blocks: GGUF's, 32 weights each.
extern "C" {

int64_t rivulet_panel_bytes(int64_t outputs, int64_t inputs, int32_t bits) {
    using namespace rivulet;
    return outputs / kLanes * Panels{nullptr, outputs, inputs, Format(bits)}.panel_bytes();
}

void rivulet_write_rows(const rivulet::Panels* panels, int64_t first, int64_t count, const float* weights) {
    for (int64_t i = 0; i < count; i++) rivulet::write_output(*panels, first + i, weights + i * panels->inputs);
}

// Unsigned integers below 16 or 256 [count][inputs] with a scale and a minimum (or minus a zero point) a group
// [count][groups].
void rivulet_write_groups(const rivulet::Panels* panels, int64_t first, int64_t count, const uint8_t* values,
                          const uint16_t* scales, const uint16_t* minima) {
    const int64_t groups = panels->inputs / rivulet::kGroup;
    for (int64_t i = 0; i < count * groups; i++)
        rivulet::write_group(*panels, first + i / groups, i % groups, values + i * rivulet::kGroup, scales[i], minima[i]);
}

// Blocks of GGUF's kinds 2, 3 and 8: Q4_0, Q4_1 and Q8_0.
void rivulet_repack_rows(const rivulet::Panels* panels, int64_t first, int64_t count, const uint8_t* blocks,
                         int32_t kind) {
    if (kind == 2) return rivulet::repack<2>(*panels, first, count, blocks);
    if (kind == 3) return rivulet::repack<3>(*panels, first, count, blocks);
    rivulet::repack<8>(*panels, first, count, blocks);
}

void rivulet_read_rows(const rivulet::Panels* panels, int64_t first, int64_t count, float* weights) {
    for (int64_t i = 0; i < count; i++) rivulet::read_output(*panels, first + i, weights + i * panels->inputs);
}

}  // extern "C"
