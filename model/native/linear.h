// Matrix products with panels as work for the crew; see linear.cpp.
#pragma once
#include <vector>

#include "products.h"
#include "threads.h"

namespace rivulet {

// Write multiplier * (outputs + bias) of all rows, or add it to what is there (the residual).
struct Linear : Work {
    Linear(const int32_t& rows, InputRows in, std::vector<Panels> weight, const float* bias, float multiplier,
           float* out, bool accumulate);
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const int32_t& rows;
    const InputRows in;
    const std::vector<Panels> weight;  // in order of the outputs
    const float* const bias;           // [outputs], or null
    const float multiplier;
    float* const out;  // [rows][outputs]
    const bool accumulate;
    int64_t outputs = 0;
    CacheStretch reads_next;
};

// out = activation(gate) * up: neither product leaves the cache.
struct GatedLinear : Work {
    GatedLinear(const int32_t& rows, InputRows in, Panels gate, Panels up, Activation activation, InputRows out)
        : rows(rows), in(in), gate(gate), up(up), activation(activation), out(out) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const int32_t& rows;
    const InputRows in;
    const Panels gate, up;
    const Activation activation;
    const InputRows out;
    CacheStretch reads_next;
};

// The same from products that were written down: [rows][gates, ups].
struct GateRows : Work {
    GateRows(const int32_t& rows, const float* gate_up, Activation activation, InputRows out)
        : rows(rows), gate_up(gate_up), activation(activation), out(out) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const int32_t& rows;
    const float* const gate_up;
    const Activation activation;
    const InputRows out;
};

}  // namespace rivulet
