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

CacheAhead::CacheAhead(const Pass& pass, const LayerCache& cache, int window, double from, double to, int64_t task,
                       int64_t tasks, int64_t pieces)
    : pass_(&pass), cache_(&cache), window_(window), from_(from), to_(to) {
    const double begin = double(task * pass.tables) / double(tasks), end = double((task + 1) * pass.tables) / double(tasks);
    for (int sequence = int(begin); sequence < pass.tables && sequence < end; sequence++) {
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
    return first_seen(pass_->lengths[sequence] - 1, window_) / kBlockTokens;
}

CacheAhead::Lines CacheAhead::lines_of(int sequence) const {
    const int64_t blocks = divide_up(pass_->lengths[sequence], kBlockTokens) - first_block(sequence);
    const double lines = double(std::min(blocks * 2 * lines_in_a_row(), kMostLines / pass_->tables));
    return {int64_t(from_ * lines), int64_t(to_ * lines)};
}

void CacheAhead::aim(int sequence, int64_t line) {
    const int64_t place = line / lines_in_a_row(), within = line % lines_in_a_row();
    const int64_t block = pass_->table(sequence, cache_->group)[first_block(sequence) + place / 2];
    const bf16* tiles = place % 2 ? cache_->value_tile(block, 0) : cache_->key_tile(block, 0);
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

CacheAhead CacheStretch::part(int64_t task, int64_t tasks, int64_t pieces) const {
    if (!pass || pass->rows < kLeastRows || pass->tables < kLeastSequences) return {};
    return {*pass, cache, window, from, to, task, tasks, pieces};
}

}  // namespace rivulet
