// Before the tiles' first use: the system's permission, and a look whether they give what the other code gives.
#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace rivulet {
namespace {

constexpr int kInputs = 3 * kGroup;
constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux: arch/x86/include/uapi/asm/prctl.h

template <int Bits, int Planes>
bool agrees(bool zero_points) {
    constexpr int kRows = 2 * kTileRows / Planes + 1;
    alignas(64) static uint8_t panel[kInputs / kGroup * (Bits * 64 + 64)];
    static int8_t values[kRows * Planes * kInputs];
    static float scales[kRows * kInputs / kGroup], sums[kRows * kInputs / kGroup];
    uint32_t state = 1;
    auto number = [&] { return state = state * 1664525u + 1013904223u, state >> 24; };
    for (uint8_t& x : panel) x = uint8_t(number());
    for (int g = 0; g < kInputs / kGroup; g++)
        for (int i = 0; i < 2 * kLanes; i++) {
            const fp16 factor = fp16(0x2000 + number());  // small and finite
            std::memcpy(panel + g * (Bits * 64 + 64) + Bits * 64 + 2 * i, &factor, 2);
        }
    for (int8_t& x : values) x = int8_t(number());
    for (float& x : scales) x = float(number()) / 256;
    for (float& x : sums) x = float(number()) / 256;
    const InputRows rows{values, scales, sums, nullptr, kInputs, Planes};
    bool same = true;
    const int end = multiply_tiles<Bits, Planes>(panel, zero_points, rows, 0, kRows, [&](int row, Floats ours) {
        Floats want[1][1];
        Ahead nothing{panel, panel};
        multiply_panels<Bits, 1, 1, Planes>(panel, zero_points, rows, row, nothing, want);
        same = same && std::memcmp(&ours, want, sizeof want) == 0;
    });
    return same && end == kRows - 1;
}

}  // namespace
}  // namespace rivulet

// 0: ready; 1: the system does not give this process tiles; 2: they do not give what they should.
extern "C" int32_t rivulet_prepare() {
    using namespace rivulet;
#if defined(__AMX_INT8__)
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
#endif
    for (const bool zero_points : {false, true})
        if (kTiles && !(agrees<4, 1>(zero_points) && agrees<4, 2>(zero_points) && agrees<8, 1>(zero_points) &&
                        agrees<8, 2>(zero_points)))
            return 2;
    return 0;
}
