// A task is a few panels for a tile of rows. How the work is cut has no influence on any sum.
#include "linear.h"

#include <algorithm>
#include <utility>

namespace rivulet {
namespace {

// How much of `parts` a task takes: small matrices are cut in a number that most crews can share evenly, large ones
// in pieces that take long enough for a task's own cost not to show.
int64_t share(int64_t parts, int64_t most) { return std::clamp<int64_t>(parts / 12, 1, most); }

int64_t panels_a_task(int64_t outputs) { return share(outputs / kLanes, 8); }
int64_t groups_a_task(int64_t groups) { return share(groups, 4); }

int64_t row_tasks(int64_t rows) { return divide_up(rows, kTaskRows); }

}  // namespace

Linear::Linear(const int32_t& rows, InputRows in, std::vector<Panels> weight, const float* bias, float multiplier,
               float* out, bool accumulate)
    : rows(rows), in(in), weight(std::move(weight)), bias(bias), multiplier(multiplier), out(out),
      accumulate(accumulate) {
    for (const Panels& panels : this->weight) outputs += panels.outputs;
}

int64_t Linear::tasks() const {
    return row_tasks(rows) * divide_up(outputs / kLanes, panels_a_task(outputs));
}

void Linear::run(int64_t task) const {
    const int64_t step = panels_a_task(outputs), parts = divide_up(outputs / kLanes, step);
    const int first_row = int(task / parts) * kTaskRows;
    const int end_row = first_row + kTaskRows < rows ? first_row + kTaskRows : rows;
    const int64_t first = task % parts * step;
    const Floats factor = Floats::all(multiplier);
    int64_t before = 0;  // panels of the segments passed
    for (const Panels& segment : weight) {
        const int64_t panels = segment.outputs / kLanes;
        for (int64_t p = first < before ? before : first; p < first + step && p < before + panels; p++)
            multiply_rows(segment, p - before, in, first_row, end_row, [&](int row, Floats y) {
                float* place = out + row * outputs + p * kLanes;
                if (bias) y = y + Floats::load(bias + p * kLanes);
                (accumulate ? fma(y, factor, Floats::load(place)) : y * factor).store(place);
            });
        before += panels;
    }
}

int64_t GatedLinear::tasks() const {
    return row_tasks(rows) * divide_up(out.groups(), groups_a_task(out.groups()));
}

void GatedLinear::run(int64_t task) const {
    const int64_t step = groups_a_task(out.groups()), parts = divide_up(out.groups(), step);
    const int first_row = int(task / parts) * kTaskRows;
    const int end_row = first_row + kTaskRows < rows ? first_row + kTaskRows : rows;
    const int64_t first = task % parts * step;
    for (int64_t group = first; group < first + step && group < out.groups(); group++)
        gate_group(gate, up, in, activation, out, group, first_row, end_row);
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
