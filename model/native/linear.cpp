// A task is a few panels for a tile of rows, and the next task the same panels for the next tile. How the work is cut has
// no influence on any sum.
#include "linear.h"

#include <algorithm>
#include <utility>

namespace rivulet {
namespace {

// So few that many threads can share a matrix evenly; one task after the other reads it in a row.
constexpr int64_t kPanelsATask = 2;

int64_t row_tasks(int64_t rows) { return divide_up(rows, kTaskRows); }

}  // namespace

Linear::Linear(const int32_t& rows, InputRows in, std::vector<Panels> weight, const float* bias, float multiplier,
               float* out, bool accumulate)
    : rows(rows), in(in), weight(std::move(weight)), bias(bias), multiplier(multiplier), out(out),
      accumulate(accumulate) {
    for (const Panels& panels : this->weight) outputs += panels.outputs;
}

int64_t Linear::tasks() const {
    return divide_up(outputs / kLanes, kPanelsATask) * row_tasks(rows);
}

void Linear::run(int64_t task) const {
    const int64_t tiles = row_tasks(rows), first = task / tiles * kPanelsATask;
    const int first_row = int(task % tiles) * kTaskRows;
    const int end_row = first_row + kTaskRows < rows ? first_row + kTaskRows : rows;
    const Floats factor = Floats::all(multiplier);
    CacheAhead cache(reads_next, task, tasks(), divide_up(kPanelsATask, kPanelBlock) * pieces(in, end_row - first_row));
    int64_t before = 0;  // panels of the segments passed
    for (const Panels& segment : weight) {
        const int64_t panels = segment.outputs / kLanes;
        const int64_t start = std::clamp(first - before, int64_t(0), panels);
        const int64_t end = std::clamp(first + kPanelsATask - before, int64_t(0), panels);
        multiply_rows(segment, start, end, in, first_row, end_row, cache, [&](int64_t panel, int row, Floats y) {
            const int64_t output = (before + panel) * kLanes;
            float* place = out + row * outputs + output;
            if (bias) y = y + Floats::load(bias + output);
            (accumulate ? fma(y, factor, Floats::load(place)) : y * factor).store(place);
        });
        before += panels;
    }
}

int64_t GatedLinear::tasks() const { return out.groups() * row_tasks(rows); }

void GatedLinear::run(int64_t task) const {
    const int64_t tiles = row_tasks(rows);
    const int first_row = int(task % tiles) * kTaskRows;
    const int end_row = first_row + kTaskRows < rows ? first_row + kTaskRows : rows;
    CacheAhead cache(reads_next, task, tasks(), divide_up(4, kPanelBlock) * pieces(in, end_row - first_row));
    gate_group(gate, up, in, activation, out, task / tiles, first_row, end_row, cache);
}

int64_t GateRows::tasks() const { return divide_up(rows, 8); }

void GateRows::run(int64_t task) const {
    const int width = out.inputs;
    for (int row = int(task) * 8; row < rows && row < (int(task) + 1) * 8; row++) {
        const float* gate = gate_up + int64_t(row) * 2 * width;
        for (int group = 0; group < out.groups(); group++, gate += kGroup) {
            const auto half = [&](int i) {
                return activate(activation, Floats::load(gate + i)) * Floats::load(gate + width + i);
            };
            write_group(half(0), half(kLanes), out, row, group);
        }
    }
}

}  // namespace rivulet
