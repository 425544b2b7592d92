// A task is a few panels for a tile of rows: the tile's activations stay in the second-level cache, a panel's
// weights in the first. How the work is cut has no influence on any sum.
#include "linear.h"

#include <utility>

namespace rivulet {
namespace {

constexpr int kTileRows = 128;

// With few rows a panel is soon done, and a task's own cost shows.
int64_t panels_a_task(int64_t rows) { return rows < 16 ? 8 : 4; }
int64_t groups_a_task(int64_t rows) { return rows < 16 ? 4 : 1; }

int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t tiles(int64_t rows) { return divide_up(rows, kTileRows); }

// Call `each(row, outputs)` for the rows from `row` to `end`, with 16 outputs of one panel.
template <int Bits, typename Each>
void multiply_rows(const uint8_t* panel, const QuantisedRows& in, int row, int end, Each each) {
    Floats outputs[kRowBlock];
    for (; row + kRowBlock <= end; row += kRowBlock) {
        multiply_panel<Bits, kRowBlock>(panel, in, row, outputs);
        for (int m = 0; m < kRowBlock; m++) each(row + m, outputs[m]);
    }
    if constexpr (kRowBlock > 4)
        if (row + 4 <= end) {
            multiply_panel<Bits, 4>(panel, in, row, outputs);
            for (int m = 0; m < 4; m++) each(row + m, outputs[m]);
            row += 4;
        }
    if constexpr (kRowBlock > 2)
        if (row + 2 <= end) {
            multiply_panel<Bits, 2>(panel, in, row, outputs);
            for (int m = 0; m < 2; m++) each(row + m, outputs[m]);
            row += 2;
        }
    if (row < end) {
        multiply_panel<Bits, 1>(panel, in, row, outputs);
        each(row, outputs[0]);
    }
}

template <typename Each>
void multiply_rows(const Panels& weight, int64_t panel, const QuantisedRows& in, int row, int end, Each each) {
    if (weight.format == Format::kBits4)
        multiply_rows<4>(weight.panel(panel), in, row, end, each);
    else
        multiply_rows<8>(weight.panel(panel), in, row, end, each);
}

// x * sigmoid(x), by e to the minus |x|, which cannot overflow.
Floats silu(Floats x) {
    const Floats e = exp(Floats::zero() - abs(x)), one = Floats::all(1.0f);
    return x * select_negative(x, e, one) / (one + e);
}

}  // namespace

Linear::Linear(const int32_t& rows, QuantisedRows in, std::vector<Panels> weight, float* out, bool accumulate)
    : rows(rows), in(in), weight(std::move(weight)), out(out), accumulate(accumulate) {
    for (const Panels& panels : this->weight) outputs += panels.outputs;
}

int64_t Linear::tasks() const {
    return tiles(rows * in.planes) * divide_up(outputs / kLanes, panels_a_task(rows));
}

void Linear::run(int64_t task) const {
    const int64_t step = panels_a_task(rows), parts = divide_up(outputs / kLanes, step);
    const int first_row = int(task / parts) * kTileRows;
    const int all_rows = rows * in.planes;
    const int end_row = first_row + kTileRows < all_rows ? first_row + kTileRows : all_rows;
    const int64_t first = task % parts * step;
    int64_t before = 0;  // panels of the segments passed
    for (const Panels& segment : weight) {
        const int64_t panels = segment.outputs / kLanes;
        for (int64_t p = first < before ? before : first; p < first + step && p < before + panels; p++)
            multiply_rows(segment, p - before, in, first_row, end_row, [&](int row, Floats y) {
                float* place = out + row / in.planes * outputs + p * kLanes;
                (accumulate || row % in.planes ? Floats::load(place) + y : y).store(place);
            });
        before += panels;
    }
}

int64_t GatedLinear::tasks() const {
    return tiles(rows) * divide_up(out.groups(), groups_a_task(rows));
}

void GatedLinear::run(int64_t task) const {
    const int64_t step = groups_a_task(rows), parts = divide_up(out.groups(), step);
    const int first_row = int(task / parts) * kTileRows;
    const int end_row = first_row + kTileRows < rows ? first_row + kTileRows : rows;
    const int64_t first = task % parts * step;
    for (int64_t group = first; group < first + step && group < out.groups(); group++)
        run_group(group, first_row, end_row);
}

void GatedLinear::run_group(int64_t group, int first_row, int end_row) const {
    Floats gates[2][kTileRows], ups[2][kTileRows];
    for (int half = 0; half < 2; half++) {
        multiply_rows(gate, 2 * group + half, in, first_row, end_row,
                      [&](int row, Floats y) { gates[half][row - first_row] = y; });
        multiply_rows(up, 2 * group + half, in, first_row, end_row,
                      [&](int row, Floats y) { ups[half][row - first_row] = y; });
    }
    for (int row = first_row; row < end_row; row++) {
        const int i = row - first_row;
        quantise_group(silu(gates[0][i]) * ups[0][i], silu(gates[1][i]) * ups[1][i], out, row, int(group));
    }
}

}  // namespace rivulet
