// Numbers one at a time, and what is said to the caches: what the sixteen lanes of vector.h share.
#pragma once
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Whether this build has AMX's tiles, or a model of them; see tiles.h.
#if defined(__AMX_INT8__) || defined(RIVULET_MODEL_OF_TILES)
#define RIVULET_TILES
#endif
// Whether it multiplies many rows by pairs; see winograd.h.
#if defined(__AVX512VNNI__) && !defined(RIVULET_TILES)
#define RIVULET_WINOGRAD
#endif

namespace rivulet {

using bf16 = uint16_t;
using fp16 = uint16_t;

constexpr int kLanes = 16;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Begin to fetch a cache line; any address will do.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// The same past the first-level cache, for what is wanted later.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// What processors of one build differ in. Zen 4 has more lines from memory at a time on their way to its second-level cache than
// to its first, so they are fetched past that; Zen 5 (family 26) is faster with the first, and with blocks that lie in a row one
// by one, for it reads ahead itself. Builds that Intel's processors alone choose keep what was measured there.
#if defined(RIVULET_TILES) || (defined(__AVX512VNNI__) && !defined(__AVX512BF16__))
constexpr bool kPastFirstLevel = false, kReadsBlocksAhead = false;
#else
inline const bool kReadsBlocksAhead = [] {
    unsigned a = 0, b, c, d;
    __get_cpuid(1, &a, &b, &c, &d);
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
    return family >= 26;
}();
inline const bool kPastFirstLevel = !kReadsBlocksAhead;
#endif
// The same for what is wanted next and comes from memory.
inline void prefetch_from_memory(const void* p) { kPastFirstLevel ? prefetch_far(p) : prefetch(p); }

// Round to nearest, ties to even; what comes in is finite.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace rivulet
