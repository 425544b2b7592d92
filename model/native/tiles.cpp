// Before the tiles' first use: the system's permission, and a look whether they give what the other code gives.
#include "tile_products.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace rivulet {
namespace {

constexpr int kInputs = 3 * kGroup;
constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux: arch/x86/include/uapi/asm/prctl.h

#if defined(RIVULET_TILES)
template <int Bits, int Planes>
bool agrees(bool zero_points) {
    constexpr int kRows = 2 * kTileRows / Planes + 1;
    alignas(64) static uint8_t panels[2][kInputs / kGroup * (Bits * 64 + 64)];
    static int8_t values[kRows * Planes * kInputs];
    static float scales[kRows * kInputs / kGroup], sums[kRows * kInputs / kGroup];
    uint32_t state = 1;
    auto number = [&] { return state = state * 1664525u + 1013904223u, state >> 24; };
    for (auto& panel : panels) {
        for (uint8_t& x : panel) x = uint8_t(number());
        for (int g = 0; g < kInputs / kGroup; g++)
            for (int i = 0; i < 2 * kLanes; i++) {
                const fp16 factor = fp16(0x2000 + number());  // small and finite
                std::memcpy(panel + g * (Bits * 64 + 64) + Bits * 64 + 2 * i, &factor, 2);
            }
    }
    for (int8_t& x : values) x = int8_t(number());
    for (float& x : scales) x = float(number()) / 256;
    for (float& x : sums) x = float(number()) / 256;
    const InputRows rows{values, scales, sums, nullptr, nullptr, kInputs, Planes};
    bool same = true;
    Ahead nothing{panels[0], panels[0]};
    CacheAhead no_cache;
    multiply_tiles<Bits, Planes>(panels[0], zero_points, rows, 0, kRows, nothing, no_cache,
                                 [&](int panel, int row, Floats ours) {
                                     Floats want[1][1];
                                     multiply_panels<Bits, Planes>(panels[panel], zero_points, rows, row, nothing, want);
                                     same = same && std::memcmp(&ours, want, sizeof want) == 0;
                                 });
    return same;
}

// Sums in float32: those of PairSum.
bool agrees_in_floats() {
    alignas(64) bf16 rows[kTileRows][kTileBytes / 2], weights[kTileRows][kTileBytes / 2];
    alignas(64) float sums[kTileRows][kLanes], before[kTileRows][kLanes];
    uint32_t state = 1;
    auto number = [&] {
        state = state * 1664525u + 1013904223u;
        return float(int32_t(state)) * (state % 2 ? 0x1p-31f : 0x1p-28f);
    };
    for (auto* tile : {rows, weights})
        for (int r = 0; r < kTileRows; r++)
            for (int i = 0; i < kTileBytes / 2; i++) tile[r][i] = to_bf16(number());
    for (auto& row : before)
        for (float& x : row) x = number();
    const TileShape whole{kTileRows, kTileBytes};
    const Tiles tiles({whole, whole, whole, {}, {}, {}, {}, {}});
    Tiles::load<0>(before, sizeof before[0]);
    Tiles::load<1>(rows, sizeof rows[0]);
    Tiles::load<2>(weights, sizeof weights[0]);
    Tiles::multiply_bf16<0, 1, 2>();
    Tiles::store<0>(sums, sizeof sums[0]);
    bool same = true;
    for (int r = 0; r < kTileRows; r++) {
        PairSum want;
        want.total = Floats::load(before[r]);
        for (int i = 0; i < kTileRows; i++) want.add(Pairs::load(weights[i]), Pairs::all(rows[r] + 2 * i));
        want.end_part();
        Floats got = Floats::load(sums[r]);
        same = same && std::memcmp(&got, &want.total, sizeof got) == 0;
    }
    return same;
}
#endif

}  // namespace
}  // namespace rivulet

// 0: ready; 1: the system does not give this process tiles; 2: they do not give what they should.
extern "C" int32_t rivulet_prepare() {
    using namespace rivulet;
#if defined(__AMX_INT8__)
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
#endif
#if defined(RIVULET_TILES)
    if (!agrees_in_floats()) return 2;
    for (const bool zero_points : {false, true})
        if (!(agrees<4, 1>(zero_points) && agrees<4, 2>(zero_points) && agrees<8, 1>(zero_points) &&
              agrees<8, 2>(zero_points)))
            return 2;
#endif
    return 0;
}
