// A task is 16 inner numbers, or a few panels of outputs, of a few rows. Neighbours with the same adapter share what is
// read of it; a row's sums run over its own inputs in their order, whoever is beside it.
#include "low_rank.h"

#include <utility>

namespace rivulet {
namespace {

constexpr int kRowsATask = 8;
constexpr int kPanelsATask = 16;
constexpr int kTogether = kFloatRowBlock > 2 ? 4 : 1;  // rows whose sums find room in registers
constexpr int kSums = 4;                               // of a row, so that additions need not wait for each other

template <int M>
struct Sums {
    Floats of[M][kSums];
    Sums() {
        for (auto& row : of)
            for (Floats& sum : row) sum = Floats::zero();
    }
    // Take in `count` inputs (a multiple of kSums) of M rows that stand `stride` apart.
    void add(const fp16* panel, const float* x, int stride, int count) {
        for (int i = 0; i < count; i += kSums)
            for (int s = 0; s < kSums; s++) {
                const Floats weights = Floats::load_fp16(panel + (i + s) * kLanes);
                for (int m = 0; m < M; m++)
                    of[m][s] = fma(weights, Floats::all(x[m * stride + i + s]), of[m][s]);
            }
    }
    Floats total(int m) const { return (of[m][0] + of[m][1]) + (of[m][2] + of[m][3]); }
};

// The numbers of one group of inputs, from the form that holds more of them.
void read_group(const InputRows& in, int row, int group, float* x) {
    const bf16* halves = in.halves ? in.row_halves(row) + group * kGroup : nullptr;
    for (int i = 0; i < kGroup; i += kLanes) {
        if (halves)
            Floats::load_bf16(halves + i).store(x + i);
        else
            (Floats::load_int8(in.row(row) + group * kGroup + i) * Floats::all(in.row_scales(row)[group])).store(x + i);
    }
}

// 16 inner numbers of M rows.
template <int M>
void shrink(const InputRows& in, int row, const fp16* panel, float* inner, int width) {
    Sums<M> sums;
    float x[M * kGroup];
    for (int group = 0; group < in.groups(); group++, panel += kGroup * kLanes) {
        for (int m = 0; m < M; m++) read_group(in, row + m, group, x + m * kGroup);
        sums.add(panel, x, kGroup, kGroup);
    }
    for (int m = 0; m < M; m++) sums.total(m).store(inner + m * width);
}

// 16 outputs of M rows.
template <int M>
void expand(const float* inner, int width, const fp16* panel, int rank, float multiplier, float* out, int outputs) {
    Sums<M> sums;
    sums.add(panel, inner, width, rank);
    for (int m = 0; m < M; m++)
        fma(sums.total(m), Floats::all(multiplier), Floats::load(out + m * outputs)).store(out + m * outputs);
}

// Runs of rows with the same adapter, out of a task's; those without one are passed over.
template <typename Each>
void each_run(const Pass& pass, int64_t block, Each each) {
    int row = int(block) * kRowsATask;
    const int end = row + kRowsATask < pass.rows ? row + kRowsATask : pass.rows;
    while (row < end) {
        const int adapter = pass.adapters[pass.sequences[row]];
        int stop = row + 1;
        while (stop < end && pass.adapters[pass.sequences[stop]] == adapter) stop++;
        if (adapter) each(adapter, row, stop);
        row = stop;
    }
}

int64_t row_tasks(const Pass& pass) { return pass.adapters ? divide_up(pass.rows, kRowsATask) : 0; }

}  // namespace

Adapters::Adapters(const LowRank* pairs, int count) {
    for (const LowRank* pair = pairs; pair < pairs + count; pair++) {
        if (int(of.size()) <= pair->adapter) of.resize(pair->adapter + 1);
        auto& mine = of[pair->adapter];
        const int place = mine.empty() ? 0 : mine.back().place + mine.back().rank;
        mine.push_back({*pair, place});
        if (place + pair->rank > width) width = place + pair->rank;
    }
}

Shrink::Shrink(const Pass& pass, InputRows in, Adapters adapters, float* inner)
    : pass(pass), in(in), adapters(std::move(adapters)), inner(inner) {}

int64_t Shrink::tasks() const { return row_tasks(pass) * (adapters.width / kLanes); }

void Shrink::run(int64_t task) const {
    const int panels = adapters.width / kLanes, width = adapters.width;
    const int place = int(task % panels) * kLanes;
    each_run(pass, task / panels, [&](int adapter, int row, int stop) {
        if (adapter >= int(adapters.of.size())) return;  // it changes other products only
        for (const auto& pair : adapters.of[adapter]) {
            if (place < pair.place || place >= pair.place + pair.rank) continue;
            const fp16* panel = pair.a + int64_t(place - pair.place) * in.inputs;
            float* to = inner + place;
            for (; row + kTogether <= stop; row += kTogether)
                shrink<kTogether>(in, row, panel, to + int64_t(row) * width, width);
            for (; row < stop; row++) shrink<1>(in, row, panel, to + int64_t(row) * width, width);
        }
    });
}

Expand::Expand(const Pass& pass, const float* inner, Adapters adapters, float multiplier, float* out, int outputs)
    : pass(pass), inner(inner), adapters(std::move(adapters)), multiplier(multiplier), out(out), outputs(outputs) {}

int64_t Expand::tasks() const { return row_tasks(pass) * divide_up(outputs / kLanes, kPanelsATask); }

void Expand::run(int64_t task) const {
    const int64_t parts = divide_up(outputs / kLanes, kPanelsATask);
    const int start = int(task % parts) * kPanelsATask * kLanes, end = start + kPanelsATask * kLanes;
    const int width = adapters.width;
    each_run(pass, task / parts, [&](int adapter, int first_row, int stop) {
        if (adapter >= int(adapters.of.size())) return;
        for (const auto& pair : adapters.of[adapter]) {
            const int last = pair.first + pair.outputs < end ? pair.first + pair.outputs : end;
            for (int output = pair.first > start ? pair.first : start; output < last; output += kLanes) {
                const fp16* panel = pair.b + int64_t(output - pair.first) * pair.rank;
                const float* from = inner + pair.place;
                float* to = out + output;
                int row = first_row;
                for (; row + kTogether <= stop; row += kTogether)
                    expand<kTogether>(from + int64_t(row) * width, width, panel, pair.rank, multiplier,
                                      to + int64_t(row) * outputs, outputs);
                for (; row < stop; row++)
                    expand<1>(from + int64_t(row) * width, width, panel, pair.rank, multiplier,
                              to + int64_t(row) * outputs, outputs);
            }
        }
    });
}

}  // namespace rivulet
