// What is done to each row on its own: embedding, norm, rotation, and their quantised results.
#include "row_ops.h"

namespace rivulet {
namespace {

// A few rows are shared by many threads, many are taken in pieces that are worth a task.
int64_t rows_a_task(int64_t rows) { return rows < 64 ? (rows + 15) / 16 : 8; }

int64_t row_tasks(int64_t rows) {
    const int64_t step = rows_a_task(rows);
    return rows ? (rows + step - 1) / step : 0;
}

template <typename Row>
void each_row(int64_t task, int64_t rows, Row row) {
    const int64_t step = rows_a_task(rows), end = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (int64_t r = task * step; r < end; r++) row(int(r));
}

// One head of a row on its way to the cache or the queries.
struct Head {
    alignas(64) float numbers[kMostHeadDim];
    alignas(64) bf16 halves[kMostHeadDim];
    const int half;

    explicit Head(int dim) : half(dim / 2) {}

    // Take a head in, times the weights of its norm and the factor of it, if there is any.
    void read(const float* x, const float* weight, float factor) {
        for (int i = 0; i < 2 * half; i += kLanes) {
            const Floats v = Floats::load(x + i);
            (weight ? v * Floats::all(factor) * Floats::load(weight + i) : v).store(numbers + i);
        }
    }
    void rotate(const float* cosines) {
        const float* sines = cosines + half;
        for (int i = 0; i < half; i += kLanes) {
            const Floats a = Floats::load(numbers + i), b = Floats::load(numbers + half + i);
            const Floats cosine = Floats::load(cosines + i), sine = Floats::load(sines + i);
            // Written out: which product is rounded is not left to a compiler.
            fma(a, cosine, Floats::zero() - b * sine).store(numbers + i);
            fma(b, cosine, a * sine).store(numbers + half + i);
        }
    }
    const bf16* rounded() {
        for (int i = 0; i < 2 * half; i += kLanes) store_bf16(Floats::load(numbers + i), halves + i);
        return halves;
    }
};

}  // namespace

int64_t Embed::tasks() const { return row_tasks(pass.rows); }

void Embed::run(int64_t task) const {
    each_row(task, pass.rows, [&](int row) {
        float* out = hidden + int64_t(row) * table.inputs;
        read_output(table, pass.token_ids[row], out);
        for (int64_t i = 0; i < table.inputs; i++) out[i] *= multiplier;
    });
}

int64_t Norm::tasks() const { return row_tasks(selected ? pass.selected : pass.rows); }

void Norm::run(int64_t task) const {
    const int size = out.inputs;
    each_row(task, selected ? pass.selected : pass.rows, [&](int row) {
        const float* x = hidden + int64_t(selected ? pass.selection[row] : row) * size;
        const Floats factor = Floats::all(rms_factor(x, size, epsilon));
        const auto normed = [&](int i) { return Floats::load(x + i) * factor * Floats::load(weight + i); };
        Floats largest = Floats::zero();
        if (out.planes == 2)
            for (int i = 0; i < size; i += kLanes) largest = max(largest, abs(normed(i)));
        const float least = kLeastShareOf16Bits * max(largest);
        for (int g = 0; g < out.groups(); g++)
            write_group(normed(g * kGroup), normed(g * kGroup + kLanes), out, row, g, least);
    });
}

int64_t Quantise::tasks() const { return row_tasks(pass.rows); }

void Quantise::run(int64_t task) const {
    each_row(task, pass.rows, [&](int row) {
        const float* x = rows + int64_t(row) * out.inputs;
        for (int g = 0; g < out.groups(); g++, x += kGroup)
            write_group(Floats::load(x), Floats::load(x + kLanes), out, row, g);
    });
}

int64_t AddRows::tasks() const { return row_tasks(pass.rows); }

void AddRows::run(int64_t task) const {
    each_row(task, pass.rows, [&](int row) {
        const float* x = rows + int64_t(row) * width;
        float* to = hidden + int64_t(row) * width;
        const Floats factor = Floats::all(weight ? multiplier * rms_factor(x, width, epsilon) : multiplier);
        for (int i = 0; i < width; i += kLanes) {
            const Floats y = Floats::load(x + i) * factor;
            fma(y, weight ? Floats::load(weight + i) : Floats::all(1.0f), Floats::load(to + i)).store(to + i);
        }
    });
}

int64_t RotateAndStore::tasks() const { return row_tasks(pass.rows); }

void RotateAndStore::run(int64_t task) const {
    const int dim = cache.head_dim, kv_heads = cache.kv_heads;
    const Floats factor = Floats::all(scale);
    Head head(dim);
    each_row(task, pass.rows, [&](int row) {
        const int position = pass.positions[row];
        // Each of so many heads, normed and rotated.
        auto each_head = [&](const float* x, int count, const float* weight, auto use) {
            float shared = weight && norm.together ? rms_factor(x, count * dim, norm.epsilon) : 1.0f;
            for (int h = 0; h < count; h++, x += dim) {
                if (weight && !norm.together) shared = rms_factor(x, dim, norm.epsilon);
                head.read(x, weight && norm.together ? weight + h * dim : weight, shared);
                if (rotary) head.rotate(rotary + int64_t(position) * dim);
                use(h);
            }
        };
        const float* in = projected + int64_t(row) * (heads + 2 * kv_heads) * dim;
        bf16* query = queries + int64_t(row) * heads * dim;
        each_head(in, heads, norm.query, [&](int h) {
            for (int i = 0; i < dim; i += kLanes)
                store_bf16(Floats::load(head.numbers + i) * factor, query + h * dim + i);
        });
        in += heads * dim;
        const int64_t block = pass.table_of(row, cache.group)[position / kBlockTokens];
        const int place = position % kBlockTokens;
        each_head(in, kv_heads, norm.key, [&](int h) {
            bf16* keys = cache.key_tile(block, h) + place * 2;
            const bf16* x = head.rounded();
            for (int i = 0; i < dim; i += 2) std::memcpy(keys + i * kBlockTokens, x + i, 4);
        });
        in += kv_heads * dim;
        for (int h = 0; h < kv_heads; h++, in += dim) {
            bf16* values = cache.value_tile(block, h) + place / 2 * 2 * dim + place % 2;
            head.read(in, nullptr, 1.0f);
            const bf16* x = head.rounded();
            for (int i = 0; i < dim; i++) values[2 * i] = x[i];
        }
    });
}

}  // namespace rivulet
