// Rows are gathered by expert, so that an expert's panels are read once a pass, by products that know of no experts.
// How many places an expert has is only known within the pass: work is cut for the most that there can be, and the
// tasks beyond find nothing to do. A row's outputs are added in order of its experts' numbers, whoever is beside it.
#include "experts.h"

#include <algorithm>
#include <utility>

namespace rivulet {
namespace {

constexpr int kRowsATask = 8, kExpertsATask = 16;
constexpr int kBlock = kFloatRowBlock;  // rows and experts whose sums find room in registers

// With few places one task does what would be three: waiting for each other would take longer.
constexpr int64_t kFewPlaces = 64;

int64_t places(const Pass& pass, const Router& router) { return int64_t(pass.rows) * router.per_token; }
bool few(const Pass& pass, const Router& router) { return places(pass, router) <= kFewPlaces; }
int64_t most_active(const Pass& pass, const Router& router) {
    return std::min<int64_t>(router.experts, places(pass, router));
}
// Whether an expert has few rows, on average: a task's own cost shows then.
bool thin(const Pass& pass, const Router& router) { return places(pass, router) < 16 * int64_t(router.experts); }

// Logits of M rows for N experts, each a sum of its own.
template <int M, int N>
void multiply(const float* const* rows, const float* weight, int inputs, float* logits, int64_t stride) {
    Floats sums[M][N];
    for (auto& row : sums)
        for (Floats& s : row) s = Floats::zero();
    for (int i = 0; i < inputs; i += kLanes) {
        Floats x[M];
        for (int m = 0; m < M; m++) x[m] = Floats::load(rows[m] + i);
        for (int n = 0; n < N; n++) {
            const Floats w = Floats::load(weight + int64_t(n) * inputs + i);
            for (int m = 0; m < M; m++) sums[m][n] = fma(x[m], w, sums[m][n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) logits[m * stride + n] = sum(sums[m][n]);
}

template <int M>
void multiply(const Router& router, const float* const* rows, int expert, int end, float* logits) {
    auto weight = [&](int e) { return router.weight + int64_t(e) * router.inputs; };
    for (; expert + kBlock <= end; expert += kBlock)
        multiply<M, kBlock>(rows, weight(expert), router.inputs, logits + expert, router.experts);
    for (; expert < end; expert++)
        multiply<M, 1>(rows, weight(expert), router.inputs, logits + expert, router.experts);
}

// The best experts of a row, equals in order of their numbers, and their parts of the softmax over all.
void choose(const Router& router, const float* logits, int32_t* chosen, float* shares) {
    float largest = logits[0];
    for (int e = 1; e < router.experts; e++) largest = std::max(largest, logits[e]);
    auto part = [&](const float* four) { return exp(Floats::load(four) - Floats::all(largest)); };
    float total = 0;
    alignas(64) float lanes[kLanes];
    for (int e = 0; e < router.experts; e += kLanes) {
        const int count = std::min(kLanes, router.experts - e);
        std::copy(logits + e, logits + e + count, lanes);
        total += sum(only(part(lanes), 0, count, 0.0f));
    }
    float taken = 0;
    for (int rank = 0; rank < router.per_token; rank++) {
        int best = -1;
        for (int e = 0; e < router.experts; e++)
            if ((best < 0 || logits[e] > logits[best]) && std::find(chosen, chosen + rank, e) == chosen + rank)
                best = e;
        chosen[rank] = best;
        std::fill(lanes, lanes + kLanes, logits[best]);
        part(lanes).store(lanes);
        shares[rank] = lanes[0];
        taken += lanes[0];
    }
    for (int rank = 0; rank < router.per_token; rank++) shares[rank] /= router.normalised ? taken : total;
}

void choose_rows(const Pass& pass, const Router& router, const Routing& to, int first, int count) {
    const int end = std::min(first + count, int(pass.rows));
    for (int64_t row = first; row < end; row++)
        choose(router, to.logits + row * router.experts, to.chosen + row * router.per_token,
               to.shares + row * router.per_token);
}

template <typename T>
void copy(const T* from, T* to, int64_t place, int64_t row, int64_t size) {
    std::memcpy(to + place * size, from + row * size, size_t(size) * sizeof(T));
}

void gather(const Routing& by, const InputRows& in, const InputRows& gathered, int64_t place, int64_t end) {
    for (; place < end; place++) {
        const int64_t row = by.rows[place];
        if (in.halves) copy(in.halves, gathered.halves, place, row, in.inputs);
        if (!in.values) continue;
        copy(in.values, gathered.values, place, row, in.inputs);
        copy(in.scales, gathered.scales, place, row, in.groups());
        copy(in.sums, gathered.sums, place, row, in.groups());
        copy(in.parts, gathered.parts, place, row, in.groups());
    }
}

}  // namespace

int64_t RouterLogits::tasks() const {
    return divide_up(pass.rows, kRowsATask) * divide_up(router.experts, kExpertsATask);
}

void RouterLogits::run(int64_t task) const {
    const int64_t parts = divide_up(router.experts, kExpertsATask);
    const int first = int(task % parts) * kExpertsATask, end = std::min(first + kExpertsATask, int(router.experts));
    const int row = int(task / parts) * kRowsATask, count = std::min(kRowsATask, pass.rows - row);
    const float* rows[kRowsATask];
    thread_local std::vector<float> normed;
    if (router.norm) normed.resize(size_t(kRowsATask) * size_t(router.inputs));
    for (int m = 0; m < count; m++) {
        const float* x = router.rows + int64_t(row + m) * router.inputs;
        rows[m] = x;
        if (!router.norm) continue;
        float* y = normed.data() + int64_t(m) * router.inputs;
        const Floats factor = Floats::all(rms_factor(x, router.inputs, router.epsilon));
        for (int i = 0; i < router.inputs; i += kLanes)
            (Floats::load(x + i) * factor * Floats::load(router.norm + i)).store(y + i);
        rows[m] = y;
    }
    float* logits = to.logits + int64_t(row) * router.experts;
    int m = 0;
    for (; m + kBlock <= count; m += kBlock)
        multiply<kBlock>(router, rows + m, first, end, logits + int64_t(m) * router.experts);
    for (; m < count; m++) multiply<1>(router, rows + m, first, end, logits + int64_t(m) * router.experts);
}

int64_t Choose::tasks() const { return few(pass, router) ? 0 : divide_up(pass.rows, kRowsATask); }

void Choose::run(int64_t task) const { choose_rows(pass, router, to, int(task) * kRowsATask, kRowsATask); }

void Group::run(int64_t) const {
    const bool alone = few(pass, router);
    if (alone) choose_rows(pass, router, to, 0, pass.rows);
    const int64_t all = places(pass, router);
    thread_local std::vector<int32_t> next;  // where an expert's next place is
    next.assign(size_t(router.experts), 0);
    for (int64_t i = 0; i < all; i++) next[size_t(to.chosen[i])]++;
    int32_t start = 0, count = 0;
    for (int32_t expert = 0; expert < router.experts; expert++) {
        const int32_t size = next[size_t(expert)];
        next[size_t(expert)] = start;
        if (!size) continue;
        to.active[count] = expert;
        to.starts[count++] = start;
        start += size;
    }
    to.starts[count] = start;
    *to.count = count;
    for (int64_t i = 0; i < all; i++) {
        const int32_t place = next[size_t(to.chosen[i])]++;
        to.rows[place] = int32_t(i / router.per_token);
        to.weights[place] = to.shares[i];
    }
    if (alone) gather(to, in, gathered, 0, all);
}

int64_t Gather::tasks() const { return few(pass, router) ? 0 : divide_up(places(pass, router), kRowsATask); }

void Gather::run(int64_t task) const {
    const int64_t first = task * kRowsATask;
    gather(by, in, gathered, first, std::min(first + kRowsATask, places(pass, router)));
}

GatedExperts::GatedExperts(const Pass& pass, Router router, Routing by, InputRows in, std::vector<Panels> gates,
                           std::vector<Panels> ups, Activation activation, InputRows out)
    : pass(pass), router(router), by(by), in(in), gates(std::move(gates)), ups(std::move(ups)),
      activation(activation), out(out) {}

int64_t GatedExperts::tasks() const {
    return most_active(pass, router) * divide_up(out.groups(), thin(pass, router) ? 4 : 1);
}

void GatedExperts::run(int64_t task) const {
    const int64_t step = thin(pass, router) ? 4 : 1, parts = divide_up(out.groups(), step);
    const int64_t index = task / parts;
    if (index >= *by.count) return;
    const size_t expert = size_t(by.active[index]);
    const int64_t first = task % parts * step, last = std::min(first + step, int64_t(out.groups()));
    const int end = by.starts[index + 1];
    CacheAhead nothing;
    for (int row = by.starts[index]; row < end; row += kTaskRows)
        for (int64_t group = first; group < last; group++)
            gate_group(gates[expert], ups[expert], in, activation, out, group, row, std::min(row + kTaskRows, end),
                       nothing);
}

MixExperts::MixExperts(const Pass& pass, Router router, Routing by, InputRows in, std::vector<Panels> downs,
                       float multiplier, float* out, bool accumulate)
    : pass(pass), router(router), by(by), in(in), downs(std::move(downs)), multiplier(multiplier), out(out),
      accumulate(accumulate) {}

// A task is a few panels of all experts: it alone writes to its columns.
constexpr int64_t kPanelsATask = 2;

int64_t MixExperts::tasks() const { return divide_up(downs[0].outputs / kLanes, kPanelsATask); }

void MixExperts::run(int64_t task) const {
    const int64_t outputs = downs[0].outputs;
    const int64_t first = task * kPanelsATask, last = std::min(first + kPanelsATask, outputs / kLanes);
    auto place_of = [&](int64_t row, int64_t panel) { return out + row * outputs + panel * kLanes; };
    if (!accumulate)
        for (int64_t row = 0; row < pass.rows; row++)
            for (int64_t p = first; p < last; p++) Floats::zero().store(place_of(row, p));
    CacheAhead nothing;
    for (int index = 0; index < *by.count; index++) {
        const Panels& down = downs[size_t(by.active[index])];
        const int end = by.starts[index + 1];
        for (int start = by.starts[index]; start < end; start += kTaskRows)
            multiply_rows(down, first, last, in, start, std::min(start + kTaskRows, end), nothing,
                          [&](int64_t panel, int row, Floats y) {
                              float* place = place_of(by.rows[row], panel);
                              fma(y, Floats::all(multiplier * by.weights[row]), Floats::load(place)).store(place);
                          });
    }
}

}  // namespace rivulet
