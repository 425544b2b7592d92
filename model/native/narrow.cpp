#include "narrow.h"

#include <cstring>

namespace rivulet {

Pass narrowed(const Pass& pass, std::vector<int32_t>& numbers) {
    if (!pass.narrows) return pass;
    const int count = pass.selected;
    for (int i = 1; i < count; i++)
        if (pass.selection[i - 1] >= pass.selection[i]) return pass;
    numbers.resize(size_t(count) * 4);
    int32_t* const token_ids = numbers.data();  // there may be none
    int32_t *const positions = token_ids + count, *const sequences = positions + count, *const selection = sequences + count;
    for (int i = 0; i < count; i++) {
        const int row = pass.selection[i];
        token_ids[i] = pass.token_ids[row];
        positions[i] = pass.positions[row];
        sequences[i] = pass.sequences[row];
        selection[i] = i;
    }
    Pass narrow = pass;
    narrow.rows = count;
    narrow.token_ids = token_ids;
    narrow.positions = positions;
    narrow.sequences = sequences;
    narrow.selection = selection;
    return narrow;
}

// One task: a row may go where another one was that has gone before.
int64_t Narrow::tasks() const { return narrowed.rows < pass.rows && narrowed.rows > 0; }

void Narrow::run(int64_t) const {
    for (int64_t i = 0; i < narrowed.rows; i++) {
        const int64_t row = pass.selection[i];
        if (row == i) continue;
        std::memcpy(hidden + i * width, hidden + row * width, size_t(width) * sizeof(float));
        std::memcpy(queries + i * query_width, queries + row * query_width, size_t(query_width) * sizeof(bf16));
    }
}

}  // namespace rivulet
