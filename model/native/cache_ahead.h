// Keys and values that attention reads next, fetched while products are computed: with many rows products wait for
// arithmetic and attention for memory.
#pragma once
#include "pass.h"
#include "vector.h"

namespace rivulet {

// A product's share in what the attention after it reads.
struct CacheStretch {
    const Pass* pass = nullptr;  // null: nothing
    LayerCache cache{};
    int window = 0;
    double from = 0, to = 0;  // of each sequence's lines, where 1 is all
};

// What a task of it fetches: lines of the cache, a piece at a time.
class CacheAhead {
  public:
    CacheAhead() = default;  // nothing
    // Of the sequences that are the task's share: it is the same thread that reads them then, if each keeps to its own. The
    // task asks for so many pieces.
    CacheAhead(const CacheStretch& stretch, int64_t task, int64_t tasks, int64_t pieces);
    void fetch() {
        if (left_) fetch_piece();
    }
    // `use` gets the next piece's lines, as many in a row as there are: the address of the first, and how many.
    template <typename Use>
    void next_piece(Use use) {
        for (int64_t wanted = piece_ < left_ ? piece_ : left_; wanted > 0;) {
            if (!in_a_row_ && line_ < lines_of(sequence_).end) aim(sequence_, line_);
            while (!in_a_row_) aim(sequence_ + 1, lines_of(sequence_ + 1).first);
            const int64_t count = wanted < in_a_row_ ? wanted : in_a_row_;
            use(next_, count);
            next_ += count * 64;
            wanted -= count;
            left_ -= count;
            line_ += count;
            in_a_row_ -= count;
        }
    }
    int64_t left() const { return left_; }

  private:
    struct Lines {
        int64_t first, end;
    };
    void fetch_piece();
    void aim(int sequence, int64_t line);
    int first_block(int sequence) const;
    Lines lines_of(int sequence) const;  // that the product fetches
    int64_t lines_in_a_row() const;

    const CacheStretch* stretch_ = nullptr;
    int64_t left_ = 0, piece_ = 0;  // lines: still to fetch, and so many at a time
    int sequence_ = 0;
    int64_t line_ = 0;      // the next one's number, of the sequence's
    int64_t in_a_row_ = 0;  // so many more in a row in memory
    const char* next_ = nullptr;
};

}  // namespace rivulet
