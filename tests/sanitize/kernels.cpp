// Runs every kernel over odd shapes on buffers that end exactly where they must, for the sanitizers to watch.
//
// Built with the kernels' own sources by tests/test_native_sanitized.py. What is computed is not looked at, but
// that it is finite; a slot of the cache that must not be read is not-a-number.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <vector>

#include "attention.h"
#include "cache_ahead.h"
#include "experts.h"
#include "linear.h"
#include "low_rank.h"
#include "row_ops.h"
#include "sampling.h"

using namespace rivulet;

extern "C" {
struct Tape;
int32_t rivulet_prepare();
Crew* rivulet_crew_new(int32_t threads);
void rivulet_crew_free(Crew* crew);
Tape* rivulet_tape_new();
void rivulet_tape_free(Tape* tape);
void rivulet_tape_run(Tape* tape, Crew* crew, const Pass* pass);
void rivulet_embed(Tape* tape, const Panels* table, float multiplier, float* hidden);
void rivulet_norm(Tape* tape, const float* hidden, const float* weight, float epsilon, const InputRows* out,
                  int32_t selected);
void rivulet_quantise(Tape* tape, const float* rows, const InputRows* out);
void rivulet_add_rows(Tape* tape, const float* rows, const float* weight, float epsilon, float multiplier,
                      float* hidden, int32_t width);
void rivulet_linear(Tape* tape, const InputRows* in, const Panels* weight, int32_t segments, const float* bias,
                    float multiplier, float* out, int32_t accumulate, int32_t selected);
void rivulet_gated_linear(Tape* tape, const InputRows* in, const Panels* gate, const Panels* up,
                          int32_t activation, const InputRows* out);
void rivulet_gate_rows(Tape* tape, const float* gate_up, int32_t activation, const InputRows* out);
void rivulet_low_rank(Tape* tape, const InputRows* in, const LowRank* pairs, int32_t count, float* inner,
                      float multiplier, float* out, int32_t outputs);
void rivulet_gated_experts(Tape* tape, const Router* router, const Routing* routing, const InputRows* in,
                           const InputRows* gathered, const Panels* gates, const Panels* ups, int32_t activation,
                           const InputRows* out);
void rivulet_mix_experts(Tape* tape, const Router* router, const Routing* routing, const InputRows* in,
                         const Panels* downs, float multiplier, float* out, int32_t accumulate);
void rivulet_rotate_and_store(Tape* tape, const float* projected, const HeadNorm* norm, const float* rotary,
                              const LayerCache* cache, int32_t heads, float scale, bf16* queries);
void rivulet_narrow(Tape* tape, float* hidden, int32_t width, bf16* queries, int32_t query_width);
void rivulet_attention(Tape* tape, const bf16* queries, const LayerCache* cache, int32_t heads,
                       int32_t window, const InputRows* out);
void rivulet_summarise(Crew* crew, const float* logits, int64_t stride, int64_t size, int32_t rows, int64_t* best,
                       float* log_sum_exp);
void rivulet_sample(Crew* crew, const float* logits, int64_t stride, int64_t size, const Draw* draws, int64_t count,
                    int64_t* tokens);
int64_t rivulet_panel_bytes(int64_t outputs, int64_t inputs, int32_t bits);
void rivulet_write_rows(const Panels* panels, int64_t first, int64_t count, const float* weights);
void rivulet_write_groups(const Panels* panels, int64_t first, int64_t count, const uint8_t* values,
                          const uint16_t* scales, const uint16_t* minima);
void rivulet_repack_rows(const Panels* panels, int64_t first, int64_t count, const uint8_t* blocks, int32_t kind);
void rivulet_read_rows(const Panels* panels, int64_t first, int64_t count, float* weights);
}

namespace {

uint64_t state = 1;

float random_number() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return float(int32_t(state >> 32)) / 2147483648.0f;
}

std::vector<float> numbers(int64_t count) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& x : made) x = random_number();
    return made;
}

void check(const std::vector<float>& values, const char* what) {
    for (const float x : values)
        if (!std::isfinite(x)) {
            std::printf("%s: not finite\n", what);
            std::exit(1);
        }
}

// A matrix of so many outputs, the last panel filled up with none.
struct Matrix {
    std::vector<uint8_t> memory;
    Panels panels;

    Matrix(int64_t outputs, int64_t inputs, int bits) {
        const int64_t padded = (outputs + 15) / 16 * 16;
        memory.resize(size_t(rivulet_panel_bytes(padded, inputs, bits)));
        panels = {memory.data(), padded, inputs, Format(bits)};
        rivulet_write_rows(&panels, 0, outputs, numbers(outputs * inputs).data());
        std::vector<float> back(size_t(outputs * inputs));
        rivulet_read_rows(&panels, 0, outputs, back.data());
        check(back, "weights");
    }
};

struct Rows {
    std::vector<int8_t> values;
    std::vector<float> scales, sums;
    std::vector<int32_t> parts;
    std::vector<bf16> halves;
    InputRows view;

    Rows(int rows, int inputs, int planes = 1)
        : values(size_t(rows * planes * inputs)),
          scales(size_t(rows * (inputs / kGroup))),
          sums(scales.size()),
          parts(scales.size()),
          halves(values.size()),
          view{values.data(), scales.data(), sums.data(), parts.data(), halves.data(), inputs, planes} {}
};

void repack(int kind, int block_bytes) {
    const int64_t outputs = 19, inputs = 96;
    const int bits = kind == 8 ? 8 : 4;
    std::vector<uint8_t> memory(size_t(rivulet_panel_bytes(32, inputs, bits)));
    const Panels panels{memory.data(), 32, inputs, Format(bits)};
    std::vector<uint8_t> blocks(size_t(outputs * inputs / kGroup * block_bytes + 1));
    for (uint8_t& byte : blocks) byte = uint8_t(random_number() * 60);
    rivulet_repack_rows(&panels, 0, outputs, blocks.data() + 1, kind);  // a mapped file aligns nothing
}

void groups(int bits) {
    const int64_t outputs = 19, inputs = 96, count = outputs * inputs / kGroup;
    std::vector<uint8_t> memory(size_t(rivulet_panel_bytes(32, inputs, bits)));
    const Panels panels{memory.data(), 32, inputs, Format(bits), 1};
    const std::vector<uint8_t> values(size_t(outputs * inputs), 15);
    const std::vector<uint16_t> scales(size_t(count), 0x2000), zeros(size_t(count), 0xc800);  // 2^-7, -8
    rivulet_write_groups(&panels, 0, outputs, values.data(), scales.data(), zeros.data());
    std::vector<float> back(values.size());
    rivulet_read_rows(&panels, 0, outputs, back.data());
    for (const float x : back)
        if (x != 7.0f / 128) check({NAN}, "groups");
}

// Six experts, of which a row takes two, on top of `hidden`.
struct Experts {
    static constexpr int kCount = 6, kPerToken = 2;
    std::vector<Matrix> matrices;
    std::vector<Panels> gates, ups, downs;
    std::vector<float> weight, logits, shares, weights;
    std::vector<int32_t> chosen, places, active, starts, count;
    Rows gathered, gated;
    Router router;
    Routing routing;

    Experts(int rows, int width, int size, int bits, const float* hidden, const float* norm)
        : weight(numbers(kCount * width)), logits(size_t(rows * kCount)), shares(size_t(rows * kPerToken)),
          weights(shares.size()), chosen(shares.size()), places(shares.size()), active(kCount), starts(kCount + 1),
          count(1), gathered(rows * kPerToken, width), gated(rows * kPerToken, size),
          router{hidden, norm, weight.data(), 1e-5f, width, kCount, kPerToken, rows % 2},
          routing{logits.data(), chosen.data(), shares.data(), places.data(),
                  weights.data(), active.data(), starts.data(), count.data()} {
        matrices.reserve(3 * kCount);
        auto matrix = [&](int outputs, int inputs) {
            matrices.emplace_back(outputs, inputs, bits);
            return matrices.back().panels;
        };
        for (int expert = 0; expert < kCount; expert++) {
            gates.push_back(matrix(size, width));
            ups.push_back(matrix(size, width));
            downs.push_back(matrix(width, size));
        }
    }
    void record(Tape* tape, const InputRows& in, float* hidden) {
        rivulet_gated_experts(tape, &router, &routing, &in, &gathered.view, gates.data(), ups.data(), 0, &gated.view);
        rivulet_mix_experts(tape, &router, &routing, &gated.view, downs.data(), 0.5f, hidden, 1);
    }
};

// One layer, then what other families have, and the logits, for sequences that end at `stops`, each with `count`
// rows.
void layer(Crew* crew, int width, int size, int heads, int kv_heads, int dim, int vocabulary, int bits, int count,
           const std::vector<int>& stops, int window = 0) {
    const int rows = count * int(stops.size()), query = heads * dim, key = kv_heads * dim;
    const int other = bits == 4 ? 8 : bits == 8 ? 16 : 4;
    const Matrix table(vocabulary, width, bits), q(query, width, other), k(key, width, bits), v(key, width, bits),
        output(width, query, bits), gate(size, width, bits), up(size, width, other), down(width, size, bits);
    std::vector<int32_t> tokens, positions, sequences, tables, selection;
    int blocks = 0, longest = 0;
    for (const int stop : stops) longest = stop > longest ? stop : longest;
    const int table_width = (longest + kBlockTokens - 1) / kBlockTokens;
    for (size_t s = 0; s < stops.size(); s++) {
        for (int b = 0; b < table_width; b++) tables.push_back(b * kBlockTokens < stops[s] ? blocks++ : 0);
        for (int i = 0; i < count; i++) {
            tokens.push_back(int(size_t(i) + s) % vocabulary);
            positions.push_back(stops[s] - count + i);
            sequences.push_back(int32_t(s));
        }
        selection.push_back(int32_t((s + 1) * size_t(count)) - 1);
    }
    tokens.back() = vocabulary - 1;
    const int64_t tile = int64_t(blocks) * kv_heads * kBlockTokens * dim;
    std::vector<bf16> keys(size_t(tile), 0x7fc0), values(size_t(tile), 0x7fc0), queries(size_t(rows) * size_t(query));
    const LayerCache cache{keys.data(), values.data(), kv_heads, dim};
    for (size_t s = 0; s < stops.size(); s++)  // what earlier passes wrote
        for (int p = 0; p < stops[s] - count; p++) {
            const int32_t block = tables[s * size_t(table_width) + size_t(p / kBlockTokens)];
            const int place = p % kBlockTokens;
            for (int h = 0; h < kv_heads; h++)
                for (int i = 0; i < dim; i++) {
                    cache.key_tile(block, h)[(i / 2 * kBlockTokens + place) * 2 + i % 2] = to_bf16(random_number());
                    cache.value_tile(block, h)[(place / 2 * dim + i) * 2 + place % 2] = to_bf16(random_number());
                }
        }
    const int selected = int(stops.size());
    std::vector<float> hidden(size_t(rows * width)), norm = numbers(width), rotary = numbers(int64_t(longest) * dim),
        projected(size_t(rows * (query + 2 * key))), logits(size_t(selected * table.panels.outputs));
    Rows normed(rows, width), attended(rows, query), gated(rows, size), last(selected, width, 2);
    const Panels qkv[] = {q.panels, k.panels, v.panels}, gate_up[] = {gate.panels, up.panels};
    const std::vector<float> qkv_bias = numbers(query + 2 * key), bias = numbers(width);
    std::vector<float> both(size_t(rows * size * 2)), branch(hidden.size()),
        inner(size_t(rows * 32));
    // Norms of all heads together, or of each.
    const std::vector<float> query_norm = numbers(window ? query : dim), key_norm = numbers(window ? key : dim);
    const HeadNorm norms{query_norm.data(), key_norm.data(), 1e-5f, window ? 1 : 0};
    // Two adapters in this product, of ranks 16 and 32; a third that changes others only; and none.
    std::vector<int32_t> adapters;
    for (size_t s = 0; s < stops.size(); s++) adapters.push_back(int32_t((s + 1) % 4));
    const std::vector<uint16_t> first_a(size_t(16 * query), 0x2c00), first_b(size_t(width * 16), 0x2c00),
        second_a(size_t(32 * query), 0x2c00), second_b(16 * 32, 0x2c00);  // 1 / 16
    const LowRank pairs[] = {{first_a.data(), first_b.data(), 1, 16, 0, width},
                             {second_a.data(), second_b.data(), 2, 32, width - 16, 16}};
    Experts experts(rows, width, size, bits, hidden.data(), norm.data());
    Tape* tape = rivulet_tape_new();
    rivulet_embed(tape, &table.panels, 1.5f, hidden.data());
    rivulet_norm(tape, hidden.data(), norm.data(), 1e-5f, &normed.view, 0);
    rivulet_linear(tape, &normed.view, qkv, 3, qkv_bias.data(), 1.0f, projected.data(), 0, 0);
    rivulet_rotate_and_store(tape, projected.data(), &norms, window ? nullptr : rotary.data(), &cache, heads, 0.2f,
                             queries.data());
    rivulet_narrow(tape, hidden.data(), width, queries.data(), heads * dim);
    rivulet_attention(tape, queries.data(), &cache, heads, window, &attended.view);
    rivulet_linear(tape, &attended.view, &output.panels, 1, bias.data(), 0.5f, hidden.data(), 1, 0);
    rivulet_low_rank(tape, &attended.view, pairs, 2, inner.data(), 0.5f, hidden.data(), width);
    rivulet_norm(tape, hidden.data(), norm.data(), 1e-5f, &normed.view, 0);
    rivulet_gated_linear(tape, &normed.view, &gate.panels, &up.panels, window ? 1 : 0, &gated.view);
    rivulet_linear(tape, &gated.view, &down.panels, 1, nullptr, 1.0f, hidden.data(), 1, 0);
    rivulet_quantise(tape, hidden.data(), &normed.view);
    rivulet_linear(tape, &normed.view, gate_up, 2, nullptr, 1.0f, both.data(), 0, 0);
    rivulet_gate_rows(tape, both.data(), window ? 1 : 0, &gated.view);
    rivulet_linear(tape, &gated.view, &down.panels, 1, nullptr, 1.0f, branch.data(), 0, 0);
    rivulet_add_rows(tape, branch.data(), norm.data(), 1e-5f, 0.5f, hidden.data(), width);
    rivulet_add_rows(tape, branch.data(), nullptr, 0.0f, 0.5f, hidden.data(), width);
    rivulet_norm(tape, hidden.data(), norm.data(), 1e-5f, &normed.view, 0);
    experts.record(tape, normed.view, hidden.data());
    rivulet_norm(tape, hidden.data(), norm.data(), 1e-5f, &last.view, 1);
    rivulet_linear(tape, &last.view, &table.panels, 1, nullptr, 2.0f, logits.data(), 0, 1);
    Pass pass{rows,             selected,     table_width,   selected,         tokens.data(),  positions.data(),
              sequences.data(), stops.data(), tables.data(), selection.data(), adapters.data()};
    for (pass.narrows = 0; pass.narrows < 2; pass.narrows++) rivulet_tape_run(tape, crew, &pass);
    pass.narrows = 1, pass.selected = 0;  // a part of a prompt
    rivulet_tape_run(tape, crew, &pass);
    rivulet_tape_free(tape);
    check(hidden, "hidden");
    check(logits, "logits");
    check(attended.scales, "attention");
}

// What products fetch for the attention after them: each line that it reads once, and no other.
void cache_ahead(const std::vector<int>& lengths, int window, int tasks, int pieces) {
    const int heads = 3, dim = 64, width = 80, sequences = int(lengths.size());
    std::vector<int32_t> tables;
    for (int block = 0; block < sequences * width; block++) tables.push_back((block * 7) % (sequences * width));
    std::vector<bf16> keys(size_t(sequences * width) * heads * kBlockTokens * dim), values(keys.size());
    const LayerCache cache{keys.data(), values.data(), heads, dim, 0};
    Pass pass{};
    pass.rows = 64, pass.tables = sequences, pass.table_width = width;
    pass.lengths = lengths.data(), pass.block_tables = tables.data();
    std::multiset<const char*> fetched, wanted;
    const double ends[] = {0, 0.1, 0.55, 0.9, 1};  // of four products
    for (int product = 0; product < 4; product++) {
        const CacheStretch stretch{&pass, cache, window, ends[product], ends[product + 1]};
        for (int task = 0; task < tasks; task++) {
            CacheAhead ahead(stretch, task, tasks, pieces);
            for (int i = 0; i < pieces; i++)
                ahead.next_piece([&](const char* line, int64_t count) {
                    for (int64_t j = 0; j < count; j++) fetched.insert(line + j * 64);
                });
            if (ahead.left()) check({NAN}, "a task's pieces");
        }
    }
    for (int s = 0; s < sequences; s++)
        for (int b = first_seen(lengths[size_t(s)] - 1, window) / kBlockTokens; b * kBlockTokens < lengths[size_t(s)]; b++)
            for (const bf16* tile : {cache.key_tile(pass.table(s, 0)[b], 0), cache.value_tile(pass.table(s, 0)[b], 0)})
                for (int64_t i = 0; i < heads * cache.tile() * 2; i += 64)
                    wanted.insert(reinterpret_cast<const char*>(tile) + i);
    if (fetched != wanted) check({NAN}, "what is fetched ahead");
}

void sampling(Crew* crew, int size) {
    const int rows = 8;
    for (const float spread : {0.0f, 1.0f, 30.0f}) {
        std::vector<float> logits = numbers(int64_t(rows) * size), normaliser(rows);
        for (float& x : logits) x *= spread;
        if (size > 2) logits[1] = -INFINITY;
        std::vector<int64_t> best(rows), tokens(rows);
        const Draw draws[rows] = {{0, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0},     {1, 3, 0.5f, 1.0f, 0.0f, 1.0f, 0.5},
                                  {2, 0, 1.0f, 0.9f, 0.0f, 1.0f, 0.999},   {3, 0, 1e-6f, 1e-6f, 1.0f, 1.0f, 0.3},
                                  {4, 60000, 2.0f, 0.5f, 0.1f, 0.7f, 0.7}, {5, 0, 1e6f, 0.99f, 0.0f, 1.0f, 1 - 1e-16},
                                  {6, 0, 1.0f, 1.0f, 0.0f, 0.9f, 0.4},     {7, 0, 1e6f, 1.0f, 0.0f, 1e-9f, 0.4}};
        rivulet_summarise(crew, logits.data(), size, size, rows, best.data(), normaliser.data());
        rivulet_sample(crew, logits.data(), size, size, draws, rows, tokens.data());
        check(normaliser, "normaliser");
        for (int i = 0; i < rows; i++)
            if (best[size_t(i)] < 0 || best[size_t(i)] >= size || tokens[size_t(i)] < 0 || tokens[size_t(i)] >= size) {
                std::printf("a token out of %d\n", size);
                std::exit(1);
            }
    }
}

}  // namespace

int main(int count, char**) {
    // An argument asks for a fault, to show that the sanitizers look.
    if (count > 1) {
        Rows rows(1, 64);
        rows.view.inputs = 96;
        const std::vector<float> x = numbers(96);
        write_group(Floats::load(&x[64]), Floats::load(&x[80]), rows.view, 0, 2);
        return 0;
    }
    if (rivulet_prepare() != 0) {
        std::puts("not ready");
        return 1;
    }
    repack(2, 18);
    repack(3, 20);
    repack(8, 34);
    groups(4);
    groups(8);
    for (const int threads : {1, 3}) {
        Crew* crew = rivulet_crew_new(threads);
        for (const int bits : {4, 8, 16}) {
            layer(crew, 32, 32, 1, 1, 32, 5, bits, 1, {1});
            layer(crew, 96, 160, 6, 2, 32, 37, bits, 1, {1, 2, 15, 16, 17, 33, 300, 31, 9});
            layer(crew, 64, 96, 5, 1, 64, 16, bits, 7, {7, 20, 100});
            layer(crew, 64, 96, 4, 1, 64, 16, bits, 7, {7, 20, 100}, 17);
            layer(crew, 64, 96, 4, 1, 64, 16, bits, 7, {515, 1090}, 521);
            layer(crew, 96, 32, 3, 3, 96, 33, bits, 3, {3, 16, 17});
            layer(crew, 64, 96, 3, 1, 64, 16, bits, 21, {21, 40, 100}, 17);
            layer(crew, 64, 96, 6, 1, 96, 16, bits, 20, {20, 518, 530});
            layer(crew, 32, 96, 8, 1, 128, 17, bits, 33, {33, 48});
            layer(crew, 64, 64, 2, 2, 256, 260, bits, 129, {129});
        }
        for (const int size : {1, 5, 16, 17, 260, 4097, 49152}) sampling(crew, size);
        layer(crew, 64, 96, 4, 2, 64, 16, 4, 3, {3, 16, 17, 100, 4, 33, 48, 260, 9});
        layer(crew, 64, 96, 4, 2, 64, 16, 4, 3, {3, 16, 17, 100, 4, 33, 48, 260, 9}, 17);
        rivulet_crew_free(crew);
    }
    const std::vector<int> lengths = {1, 16, 17, 300, 5, 479, 31, 32, 33, 450, 100};
    for (const int window : {0, 17, 500})
        for (const int tasks : {1, 2, 7, 48, 1000})
            for (const int pieces : {1, 3, 28}) cache_ahead(lengths, window, tasks, pieces);
    std::puts("done");
}
