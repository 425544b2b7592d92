// Matrix products with panels as work for the crew; see linear.cpp.
#pragma once
#include <vector>

#include "panels.h"
#include "threads.h"

namespace rivulet {

// Write the outputs of all rows, or add them to what is there (the residual).
struct Linear : Work {
    Linear(const int32_t& rows, InputRows in, std::vector<Panels> weight, float* out, bool accumulate);
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const int32_t& rows;
    const InputRows in;
    const std::vector<Panels> weight;  // in order of the outputs
    float* const out;                  // [rows][outputs]
    const bool accumulate;
    int64_t outputs = 0;
};

enum class Activation : int32_t { kSilu = 0, kGelu = 1 };

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

  private:
    void run_group(int64_t group, int first_row, int end_row) const;
};

}  // namespace rivulet
