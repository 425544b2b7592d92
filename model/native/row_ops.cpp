// What is done to each row on its own: embedding, norm, rotation, and their quantised results.
#include "row_ops.h"

#include <cmath>

namespace rivulet {
namespace {

constexpr int kRowsATask = 8;

int64_t row_tasks(int64_t rows) { return (rows + kRowsATask - 1) / kRowsATask; }

template <typename Row>
void each_row(int64_t task, int64_t rows, Row row) {
    const int64_t end = (task + 1) * kRowsATask < rows ? (task + 1) * kRowsATask : rows;
    for (int64_t r = task * kRowsATask; r < end; r++) row(int(r));
}

}  // namespace

int64_t Embed::tasks() const { return row_tasks(pass.rows); }

void Embed::run(int64_t task) const {
    each_row(task, pass.rows, [&](int row) {
        float* out = hidden + int64_t(row) * table.inputs;
        read_output(table, pass.token_ids[row], out);
    });
}

int64_t Norm::tasks() const { return row_tasks(selected ? pass.selected : pass.rows); }

void Norm::run(int64_t task) const {
    const int size = out.inputs;
    each_row(task, selected ? pass.selected : pass.rows, [&](int row) {
        const float* x = hidden + int64_t(selected ? pass.selection[row] : row) * size;
        Floats squares = Floats::zero();
        for (int i = 0; i < size; i += kLanes) {
            const Floats v = Floats::load(x + i);
            squares = fma(v, v, squares);
        }
        const Floats factor = Floats::all(1.0f / std::sqrt(sum(squares) / float(size) + epsilon));
        for (int g = 0; g < out.groups(); g++) {
            const int i = g * kGroup;
            write_group(Floats::load(x + i) * factor * Floats::load(weight + i),
                            Floats::load(x + i + 16) * factor * Floats::load(weight + i + 16), out, row, g);
        }
    });
}

int64_t RotateAndStore::tasks() const { return row_tasks(pass.rows); }

void RotateAndStore::run(int64_t task) const {
    const int dim = cache.head_dim, half = dim / 2, kv_heads = cache.kv_heads;
    const float scale = 1.0f / std::sqrt(float(dim));
    each_row(task, pass.rows, [&](int row) {
        const int position = pass.positions[row];
        const float* cosine = rotary + int64_t(position) * dim;
        const float* sine = cosine + half;
        const float* in = projected + int64_t(row) * (heads + 2 * kv_heads) * dim;
        bf16* query = queries + int64_t(row) * heads * dim;
        for (int h = 0; h < heads; h++, in += dim, query += dim)
            for (int i = 0; i < half; i++) {
                query[i] = to_bf16((in[i] * cosine[i] - in[i + half] * sine[i]) * scale);
                query[i + half] = to_bf16((in[i + half] * cosine[i] + in[i] * sine[i]) * scale);
            }
        const int32_t* table = pass.block_tables + int64_t(pass.sequences[row]) * pass.table_width;
        const int64_t block = table[position / kBlockTokens];
        const int place = position % kBlockTokens;
        for (int h = 0; h < kv_heads; h++) {
            const float *key = in + h * dim, *value = in + (kv_heads + h) * dim;
            bf16 *keys = cache.key_tile(block, h), *values = cache.value_tile(block, h);
            for (int i = 0; i < half; i++) {
                const int j = i + half;
                keys[(i / 2 * kBlockTokens + place) * 2 + i % 2] = to_bf16(key[i] * cosine[i] - key[j] * sine[i]);
                keys[(j / 2 * kBlockTokens + place) * 2 + j % 2] = to_bf16(key[j] * cosine[i] + key[i] * sine[i]);
            }
            for (int i = 0; i < dim; i++) values[(place / 2 * dim + i) * 2 + place % 2] = to_bf16(value[i]);
        }
    });
}

}  // namespace rivulet
