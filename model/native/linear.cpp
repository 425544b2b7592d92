// A task is a few panels for a tile of rows: the tile's activations stay in the second-level cache, a panel's
// weights in the first. How the work is cut has no influence on any sum.
#include "linear.h"

#include <utility>

#include "tiles.h"

namespace rivulet {
namespace {

constexpr int kTaskRows = 128;

// With few rows a panel is soon done, and a task's own cost shows.
int64_t panels_a_task(int64_t rows) { return rows < 16 ? 8 : 4; }
int64_t groups_a_task(int64_t rows) { return rows < 16 ? 4 : 1; }

int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t row_tasks(int64_t rows) { return divide_up(rows, kTaskRows); }

// 16 outputs of M rows.
template <int Bits, int M>
void multiply(const uint8_t* panel, const InputRows& in, int row, Floats* outputs) {
    if constexpr (Bits == 16)
        multiply_bf16_panel<M>(panel, in, row, outputs);
    else
        multiply_panel<Bits, M>(panel, in, row, outputs);
}

// As many times M rows as there are: `each(row, outputs)` gets the 16 outputs of a row.
template <int Bits, int M, typename Each>
int multiply_blocks(const uint8_t* panel, const InputRows& in, int row, int end, Each each) {
    Floats outputs[M];
    for (; row + M <= end; row += M) {
        multiply<Bits, M>(panel, in, row, outputs);
        for (int m = 0; m < M; m++) each(row + m, outputs[m]);
    }
    return row;
}

template <int Bits, typename Each>
void multiply_rows(const uint8_t* panel, const InputRows& in, int row, int end, Each each) {
    if constexpr (kTiles && Bits != 16) row = multiply_tiles<Bits>(panel, in, row, end, each);
    row = multiply_blocks<Bits, kRowBlock>(panel, in, row, end, each);
    if constexpr (kRowBlock > 4) row = multiply_blocks<Bits, 4>(panel, in, row, end, each);
    if constexpr (kRowBlock > 2) row = multiply_blocks<Bits, 2>(panel, in, row, end, each);
    multiply_blocks<Bits, 1>(panel, in, row, end, each);
}

template <typename Each>
void multiply_rows(const Panels& weight, int64_t panel, const InputRows& in, int row, int end, Each each) {
    switch (weight.format) {
        case Format::kBits4: return multiply_rows<4>(weight.panel(panel), in, row, end, each);
        case Format::kBits8: return multiply_rows<8>(weight.panel(panel), in, row, end, each);
        case Format::kBits16: return multiply_rows<16>(weight.panel(panel), in, row, end, each);
    }
}

// 1 / (1 + e^-x), by e to the minus |x|, which cannot overflow.
Floats sigmoid(Floats x) {
    const Floats e = exp(Floats::zero() - abs(x)), one = Floats::all(1.0f);
    return select_negative(x, e, one) / (one + e);
}

// silu(x) = x * sigmoid(x). GELU in its tanh form (arXiv:1606.08415): (1 + tanh(u)) / 2 = sigmoid(2 u) with
// u = sqrt(2 / pi) * (x + 0.044715 * x^3).
Floats activate(Activation activation, Floats x) {
    if (activation == Activation::kSilu) return x * sigmoid(x);
    const Floats inner = fma(x * x * x, Floats::all(0.044715f), x);
    return x * sigmoid(inner * Floats::all(1.5957691216f));
}

}  // namespace

Linear::Linear(const int32_t& rows, InputRows in, std::vector<Panels> weight, float* out, bool accumulate)
    : rows(rows), in(in), weight(std::move(weight)), out(out), accumulate(accumulate) {
    for (const Panels& panels : this->weight) outputs += panels.outputs;
}

int64_t Linear::tasks() const {
    return row_tasks(rows * in.planes) * divide_up(outputs / kLanes, panels_a_task(rows));
}

void Linear::run(int64_t task) const {
    const int64_t step = panels_a_task(rows), parts = divide_up(outputs / kLanes, step);
    const int first_row = int(task / parts) * kTaskRows;
    const int all_rows = rows * in.planes;
    const int end_row = first_row + kTaskRows < all_rows ? first_row + kTaskRows : all_rows;
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
    return row_tasks(rows) * divide_up(out.groups(), groups_a_task(rows));
}

void GatedLinear::run(int64_t task) const {
    const int64_t step = groups_a_task(rows), parts = divide_up(out.groups(), step);
    const int first_row = int(task / parts) * kTaskRows;
    const int end_row = first_row + kTaskRows < rows ? first_row + kTaskRows : rows;
    const int64_t first = task % parts * step;
    for (int64_t group = first; group < first + step && group < out.groups(); group++)
        run_group(group, first_row, end_row);
}

void GatedLinear::run_group(int64_t group, int first_row, int end_row) const {
    Floats gates[2][kTaskRows], ups[2][kTaskRows];
    for (int half = 0; half < 2; half++) {
        multiply_rows(gate, 2 * group + half, in, first_row, end_row,
                      [&](int row, Floats y) { gates[half][row - first_row] = y; });
        multiply_rows(up, 2 * group + half, in, first_row, end_row,
                      [&](int row, Floats y) { ups[half][row - first_row] = y; });
    }
    for (int row = first_row; row < end_row; row++) {
        const int i = row - first_row;
        write_group(activate(activation, gates[0][i]) * ups[0][i], activate(activation, gates[1][i]) * ups[1][i], out,
                    row, int(group));
    }
}

}  // namespace rivulet
