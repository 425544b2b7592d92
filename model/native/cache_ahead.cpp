// The order of the lines: sequence by sequence, block by block, a block's keys of all heads before its values.
#include "cache_ahead.h"

#include <algorithm>

#include "rows.h"

namespace rivulet {
namespace {

// With fewer rows products wait for memory themselves; fewer sequences read so little that asking costs what it gains.
constexpr int kLeastRows = 16, kLeastSequences = 8;
// Of one layer so much is fetched: what stays in the caches until its turn.
constexpr int64_t kMostLines = (4 << 20) / 64;
constexpr int64_t kLeastPiece = 16;

}  // namespace

CacheAhead::CacheAhead(const CacheStretch& stretch, int64_t task, int64_t tasks, int64_t pieces) : stretch_(&stretch) {
    if (!stretch.pass || stretch.pass->rows < kLeastRows || stretch.pass->tables < kLeastSequences) return;
    const int sequences = stretch.pass->tables;
    const double begin = double(task * sequences) / double(tasks), end = double((task + 1) * sequences) / double(tasks);
    for (int sequence = int(begin); sequence < sequences && sequence < end; sequence++) {
        const Lines lines = lines_of(sequence);
        const auto line_at = [&](double place) {
            return lines.first + int64_t(std::clamp(place - sequence, 0.0, 1.0) * double(lines.end - lines.first));
        };
        if (!left_) aim(sequence, line_at(begin));
        left_ += line_at(end) - line_at(begin);
    }
    piece_ = std::max(divide_up(left_, pieces), kLeastPiece);
}

int CacheAhead::first_block(int sequence) const {
    return first_seen(stretch_->pass->lengths[sequence] - 1, stretch_->window) / kBlockTokens;
}

int64_t CacheAhead::lines_in_a_row() const {
    return stretch_->cache.kv_heads * stretch_->cache.tile() * int64_t(sizeof(bf16)) / 64;
}

CacheAhead::Lines CacheAhead::lines_of(int sequence) const {
    const int64_t blocks = divide_up(stretch_->pass->lengths[sequence], kBlockTokens) - first_block(sequence);
    const double lines = double(std::min(blocks * 2 * lines_in_a_row(), kMostLines / stretch_->pass->tables));
    return {int64_t(stretch_->from * lines), int64_t(stretch_->to * lines)};
}

void CacheAhead::aim(int sequence, int64_t line) {
    const int64_t place = line / lines_in_a_row(), within = line % lines_in_a_row();
    const LayerCache& cache = stretch_->cache;
    const int64_t block = stretch_->pass->table(sequence, cache.group)[first_block(sequence) + place / 2];
    const bf16* tiles = place % 2 ? cache.value_tile(block, 0) : cache.key_tile(block, 0);
    sequence_ = sequence;
    line_ = line;
    next_ = reinterpret_cast<const char*>(tiles) + within * 64;
    in_a_row_ = std::min(lines_in_a_row() - within, lines_of(sequence).end - line);
}

void CacheAhead::fetch_piece() {
    next_piece([](const char* line, int64_t count) {
        for (int64_t i = 0; i < count; i++) prefetch_far(line + i * 64);
    });
}

}  // namespace rivulet
