// AMX's tiles: eight registers a thread, of 16 rows x 64 bytes at most, and what they multiply.
//
// Builds that have none do not define RIVULET_TILES (scalar.h); RIVULET_MODEL_OF_TILES gives the instructions' meaning in plain C++, by which the
// tests run their users on any processor. Source: Intel's Software Developer's Manual, volume 2, TDPBUSD and following.
#pragma once
#include <cmath>
#include <type_traits>

#include "scalar.h"

namespace rivulet {

constexpr int kTileRows = 16, kTileBytes = 64;

struct TileShape {
    int rows = 0, row_bytes = 0;
};

#if defined(__AMX_INT8__)

// The tiles of this thread, of these shapes for as long as the object lives.
class Tiles {
  public:
    explicit Tiles(const TileShape (&shapes)[8]) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) {
            config.row_bytes[i] = uint16_t(shapes[i].row_bytes);
            config.rows[i] = uint8_t(shapes[i].rows);
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;

    template <int T>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    // Rows lie `stride` bytes apart.
    template <int T>
    static void load(const void* p, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    static void store(void* p, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    // Sum += A x B, where A has rows of signed bytes and B the same of unsigned ones in fours: row i holds the inputs from 4 i
    // of 16 outputs.
    template <int Sum, int A, int B>
    static void multiply_bytes() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
    }
    // The same of bfloat16 in pairs, with sums in float32: those of the first of each pair and of the second begin at zero,
    // are added to with one rounding, and then both to the sum.
    template <int Sum, int A, int B>
    static void multiply_bf16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
    }
};

#elif defined(RIVULET_MODEL_OF_TILES)

class Tiles {
  public:
    explicit Tiles(const TileShape (&shapes)[8]) {
        for (int i = 0; i < 8; i++) {
            state().shapes[i] = shapes[i];
            std::memset(state().bytes[i], 0, sizeof state().bytes[i]);
        }
    }
    template <int T>
    static void zero() {
        std::memset(state().bytes[T], 0, sizeof state().bytes[T]);
    }
    template <int T>
    static void load(const void* p, int64_t stride) {
        const TileShape shape = state().shapes[T];
        for (int r = 0; r < shape.rows; r++)
            std::memcpy(state().bytes[T][r], static_cast<const char*>(p) + r * stride, size_t(shape.row_bytes));
    }
    template <int T>
    static void store(void* p, int64_t stride) {
        const TileShape shape = state().shapes[T];
        for (int r = 0; r < shape.rows; r++)
            std::memcpy(static_cast<char*>(p) + r * stride, state().bytes[T][r], size_t(shape.row_bytes));
    }
    template <int Sum, int A, int B>
    static void multiply_bytes() {
        each<Sum>([](int32_t& sum, int r, int lane) {
            for (int i = 0; i < state().shapes[A].row_bytes; i++)
                sum += int8_t(state().bytes[A][r][i]) * state().bytes[B][i / 4][4 * lane + i % 4];
        });
    }
    template <int Sum, int A, int B>
    static void multiply_bf16() {
        each<Sum>([](float& sum, int r, int lane) {
            float parts[2] = {};  // of the first of each pair, and of the second
            for (int i = 0; i < state().shapes[A].row_bytes / 4; i++) {
                bf16 a[2], b[2];
                std::memcpy(a, &state().bytes[A][r][4 * i], sizeof a);
                std::memcpy(b, &state().bytes[B][i][4 * lane], sizeof b);
                for (int k = 0; k < 2; k++) parts[k] = std::fma(to_float(a[k]), to_float(b[k]), parts[k]);
            }
            sum += parts[0] + parts[1];
        });
    }

  private:
    struct State {
        TileShape shapes[8];
        alignas(64) uint8_t bytes[8][kTileRows][kTileBytes];
    };
    static State& state() {
        thread_local State of_thread;
        return of_thread;
    }
    template <int Sum, typename Add>
    static void each(Add add) {
        using Number = std::conditional_t<std::is_invocable_v<Add, float&, int, int>, float, int32_t>;
        for (int r = 0; r < state().shapes[Sum].rows; r++)
            for (int lane = 0; lane < state().shapes[Sum].row_bytes / 4; lane++) {
                uint8_t* place = &state().bytes[Sum][r][4 * lane];
                Number sum;
                std::memcpy(&sum, place, 4);
                add(sum, r, lane);
                std::memcpy(place, &sum, 4);
            }
    }
};

#endif

}  // namespace rivulet
