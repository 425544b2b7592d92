// Numbers one at a time, and what is said to the caches: what the sixteen lanes of vector.h share.
#pragma once
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
// The same for what is wanted next and comes from memory. Zen 4 has more lines at a time on their way to its second-level
// cache than to its first. Builds that Intel's processors alone choose keep what was measured there.
inline void prefetch_from_memory(const void* p) {
#if defined(RIVULET_TILES) || (defined(__AVX512VNNI__) && !defined(__AVX512BF16__))
    prefetch(p);
#else
    prefetch_far(p);
#endif
}

// Round to nearest, ties to even; what comes in is finite.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace rivulet
