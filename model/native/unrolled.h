// Loops that are written out by the compiler before it chooses registers: what they index need not lie in memory.
#pragma once
#include <utility>

namespace rivulet {

template <typename Body, int... I>
[[gnu::always_inline]] inline void unroll(Body body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

// body(0), body(1) ... body(N - 1).
template <int N, typename Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
    unroll(body, std::make_integer_sequence<int, N>{});
}

// body(p, m) for all p below P and m below M, those of one m together.
template <int P, int M, typename Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
    unrolled<M>([&](auto m) { unrolled<P>([&](auto p) { body(p, m); }); });
}

}  // namespace rivulet
