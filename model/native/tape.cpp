// The plain C interface: a tape of recorded work over one Pass, replayed by one call a step.
//
// Everything that a tape points at (weights, buffers, cache, rotary table) belongs to the caller and outlives it.
#include <memory>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "low_rank.h"
#include "narrow.h"
#include "row_ops.h"
#include "sampling.h"

using namespace rivulet;

namespace {

struct Tape {
    Pass pass{}, narrowed{};
    std::vector<int32_t> numbers;  // of the narrowed pass
    const Pass* now = &pass;       // which of them an op works on that is recorded
    std::vector<std::unique_ptr<Work>> work;
    std::vector<const Work*> order;
    std::vector<std::pair<CacheStretch*, double>> products;  // since the last attention, with their sizes

    void add(Work* recorded) {
        work.emplace_back(recorded);
        order.push_back(recorded);
    }
    void add_product(CacheStretch& reads_next, int64_t size) {
        products.emplace_back(&reads_next, double(size));
    }
    // The products before it fetch what it reads, each as much as it is large.
    void add_attention(Attention* attention) {
        add(attention);
        double all = 0, done = 0;
        for (const auto& [stretch, size] : products) all += size;
        for (const auto& [stretch, size] : products) {
            *stretch = {&pass, attention->cache, attention->window, done / all, (done + size) / all};
            done += size;
        }
        products.clear();
    }
    const int32_t& rows(int32_t selected) const { return selected ? now->selected : now->rows; }
};

}  // namespace

extern "C" {

Crew* rivulet_crew_new(int32_t threads) { return new Crew(threads); }
void rivulet_crew_free(Crew* crew) { delete crew; }

Tape* rivulet_tape_new() { return new Tape; }
void rivulet_tape_free(Tape* tape) { delete tape; }

void rivulet_tape_run(Tape* tape, Crew* crew, const Pass* pass) {
    tape->pass = *pass;
    tape->pass.threads = crew->size();
    tape->narrowed = narrowed(*pass, tape->numbers);
    crew->run(tape->order.data(), int64_t(tape->order.size()));
}

// `selected` (0 or 1): whether the op works on the rows whose logits are wanted, or on all of the pass.

void rivulet_embed(Tape* tape, const Panels* table, float multiplier, float* hidden) {
    tape->add(new Embed(*tape->now, *table, multiplier, hidden));
}

void rivulet_norm(Tape* tape, const float* hidden, const float* weight, float epsilon, const InputRows* out,
                  int32_t selected) {
    tape->add(new Norm(*tape->now, hidden, weight, epsilon, *out, selected));
}

void rivulet_quantise(Tape* tape, const float* rows, const InputRows* out) {
    tape->add(new Quantise(*tape->now, rows, *out));
}

// With a weight (it may be null) the rows are normed first.
void rivulet_add_rows(Tape* tape, const float* rows, const float* weight, float epsilon, float multiplier,
                      float* hidden, int32_t width) {
    tape->add(new AddRows(*tape->now, rows, weight, epsilon, multiplier, hidden, width));
}

// The weight is `segments` panels in order of the outputs; the bias may be null.
void rivulet_linear(Tape* tape, const InputRows* in, const Panels* weight, int32_t segments, const float* bias,
                    float multiplier, float* out, int32_t accumulate, int32_t selected) {
    const std::vector<Panels> panels(weight, weight + segments);
    auto* linear = new Linear(tape->rows(selected), *in, panels, bias, multiplier, out, accumulate);
    tape->add(linear);
    tape->add_product(linear->reads_next, linear->outputs * in->inputs);
}

void rivulet_gated_linear(Tape* tape, const InputRows* in, const Panels* gate, const Panels* up, int32_t activation,
                          const InputRows* out) {
    auto* gated = new GatedLinear(tape->rows(0), *in, *gate, *up, Activation(activation), *out);
    tape->add(gated);
    tape->add_product(gated->reads_next, 2 * gate->outputs * in->inputs);
}

void rivulet_gate_rows(Tape* tape, const float* gate_up, int32_t activation, const InputRows* out) {
    tape->add(new GateRows(tape->rows(0), gate_up, Activation(activation), *out));
}

// Adds multiplier * what the rows' adapters add to a product of `in`; `inner` has room for the widest of them.
void rivulet_low_rank(Tape* tape, const InputRows* in, const LowRank* pairs, int32_t count, float* inner,
                      float multiplier, float* out, int32_t outputs) {
    const Adapters adapters(pairs, count);
    tape->add(new Shrink(*tape->now, *in, adapters, inner));
    tape->add(new Expand(*tape->now, inner, adapters, multiplier, out, outputs));
}

// Routes all rows and computes the gates of their experts; panels are by expert.
void rivulet_gated_experts(Tape* tape, const Router* router, const Routing* routing, const InputRows* in,
                           const InputRows* gathered, const Panels* gates, const Panels* ups, int32_t activation,
                           const InputRows* out) {
    const std::vector<Panels> gate(gates, gates + router->experts), up(ups, ups + router->experts);
    tape->add(new RouterLogits(*tape->now, *router, *routing));
    tape->add(new Choose(*tape->now, *router, *routing));
    tape->add(new Group(*tape->now, *router, *routing, *in, *gathered));
    tape->add(new Gather(*tape->now, *router, *routing, *in, *gathered));
    tape->add(new GatedExperts(*tape->now, *router, *routing, *gathered, gate, up, Activation(activation), *out));
}

// What they give, from the gates' results.
void rivulet_mix_experts(Tape* tape, const Router* router, const Routing* routing, const InputRows* in,
                         const Panels* downs, float multiplier, float* out, int32_t accumulate) {
    const std::vector<Panels> down(downs, downs + router->experts);
    tape->add(new MixExperts(*tape->now, *router, *routing, *in, down, multiplier, out, accumulate));
}

// The rotary table and the norm's weights may be null.
void rivulet_rotate_and_store(Tape* tape, const float* projected, const HeadNorm* norm, const float* rotary,
                              const LayerCache* cache, int32_t heads, float scale, bf16* queries) {
    tape->add(new RotateAndStore(*tape->now, projected, *norm, rotary, *cache, heads, scale, queries));
}

// What is recorded after it works on the rows that go on, if the pass narrows: `hidden` is [rows][width], the queries are
// [rows][query_width].
void rivulet_narrow(Tape* tape, float* hidden, int32_t width, bf16* queries, int32_t query_width) {
    tape->add(new Narrow(tape->pass, tape->narrowed, hidden, width, queries, query_width));
    tape->now = &tape->narrowed;
}

void rivulet_attention(Tape* tape, const bf16* queries, const LayerCache* cache, int32_t heads, int32_t window,
                       const InputRows* out) {
    tape->add_attention(new Attention(*tape->now, queries, *cache, heads, window, *out));
}

// Logits are [rows][stride], of which `size` count.

void rivulet_summarise_selected(Tape* tape, const float* logits, int64_t stride, int64_t size, int32_t most_rows,
                                int64_t* best, float* log_sum_exp) {
    auto* parts = new SummariseParts(tape->now->selected, logits, stride, size, most_rows);
    tape->add(parts);
    tape->add(new Summarise(*parts, best, log_sum_exp));
}

void rivulet_summarise(Crew* crew, const float* logits, int64_t stride, int64_t size, int32_t rows, int64_t* best,
                       float* log_sum_exp) {
    const SummariseParts parts(rows, logits, stride, size, rows);
    const Summarise whole(parts, best, log_sum_exp);
    const Work* const list[] = {&parts, &whole};
    crew->run(list, 2);
}

void rivulet_sample(Crew* crew, const float* logits, int64_t stride, int64_t size, const Draw* draws, int64_t count,
                    int64_t* tokens) {
    const Sample work(logits, stride, size, draws, count, tokens);
    const Work* const list[] = {&work};
    crew->run(list, 1);
}

}  // extern "C"
