#include "narrow.h"

#include <cstring>

namespace rivulet {

Pass narrowed(const Pass& pass, std::vector<int32_t>& numbers) {
    const int count = pass.selected;
    for (int i = 1; i < count; i++)
        if (pass.selection[i - 1] >= pass.selection[i]) return pass;
    if (!pass.narrows) return pass;
    numbers.resize(size_t(count) * 4);
    int32_t* const parts[] = {&numbers[0], &numbers[0] + count, &numbers[0] + 2 * count, &numbers[0] + 3 * count};
    for (int i = 0; i < count; i++) {
        const int row = pass.selection[i];
        parts[0][i] = pass.token_ids[row];
        parts[1][i] = pass.positions[row];
        parts[2][i] = pass.sequences[row];
        parts[3][i] = i;
    }
    Pass narrow = pass;
    narrow.rows = count;
    narrow.token_ids = parts[0];
    narrow.positions = parts[1];
    narrow.sequences = parts[2];
    narrow.selection = parts[3];
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
