// A row sees the positions up to its own; what else lies in a block is never read into a sum. How rows and heads are put
// together has no influence on any.
#include "attention.h"

#include <algorithm>

#include "tile_attention.h"
#include "vector_attention.h"

namespace rivulet {
namespace {

// Rows of a sequence whose queries go together.
int rows_together([[maybe_unused]] int heads) {
#if defined(RIVULET_TILES)
    return std::max(kTileRows / heads, kRowsTogether);
#else
    return kRowsTogether;
#endif
}

// All query heads of `count` key heads of `rows` rows of a sequence, one behind the other, that see the same first block.
void attend(const Attention& op, int row, int rows, int kv_head, int count) {
#if defined(RIVULET_TILES)
    const int heads = op.heads / op.cache.kv_heads;
    if (rows * heads >= kLeastTileQueries && (rows == 1 || rows * heads <= kTileRows)) {
        for (int k = kv_head; k < kv_head + count; k++)
            for (int h = 0; h < heads; h += kTileRows)
                TileAttention(op, row, rows, k, h, std::min(kTileRows, heads - h)).run();
        return;
    }
#endif
    attend_by_vectors(op, row, rows, kv_head, count);
}

}  // namespace

// Where each sequence has one row they share nothing, and few rows would be too few tasks.
int Attention::rows_a_task() const {
    if (pass.rows <= pass.tables) return 1;
    return std::clamp(pass.rows / 8, 1, rows_together(heads / cache.kv_heads));
}

// What a row reads of a block lies in a row in memory. A processor that reads blocks ahead gains by that with few rows already,
// two for each thread, if it reads them whole and once.
int Attention::heads_a_task() const {
    const bool once = cache.kv_heads <= kHeadsTogether && heads / cache.kv_heads <= kQueriesTogether;
    const int least_rows = kReadsBlocksAhead && once ? 2 * pass.threads : 16;
    return pass.rows >= least_rows ? kHeadsTogether : 1;
}

int64_t Attention::tasks() const {
    return divide_up(pass.rows, rows_a_task()) * divide_up(cache.kv_heads, heads_a_task());
}

void Attention::run(int64_t task) const {
    const int parts = int(divide_up(cache.kv_heads, heads_a_task()));
    const int kv_head = int(task % parts) * heads_a_task(), count = std::min(heads_a_task(), cache.kv_heads - kv_head);
    int row = int(task / parts) * rows_a_task();
    const int end = std::min(row + rows_a_task(), pass.rows);
    // Whether a row goes with the one before it.
    const auto follows = [&](int next) {
        return pass.sequences[next - 1] == pass.sequences[next] && pass.positions[next - 1] + 1 == pass.positions[next] &&
               first_seen(next - 1) / kBlockTokens == first_seen(next) / kBlockTokens;
    };
    for (int next = row; row < end; row = next) {
        while (++next < end && follows(next)) {}
        attend(*this, row, next - row, kv_head, count);
    }
}

}  // namespace rivulet
