// What one pass over a batch shares: the rows, and where each one's keys and values are.
#pragma once
#include <cstdint>

namespace rivulet {

constexpr int kBlockTokens = 16;
constexpr int kMostHeadDim = 256;

struct Pass {
    int32_t rows;
    int32_t selected;             // rows whose logits are wanted
    int32_t table_width;          // blocks a block table
    int32_t tables;               // block tables a cache group: sequences
    const int32_t* token_ids;     // [rows]
    const int32_t* positions;     // [rows]
    const int32_t* sequences;     // [rows]
    const int32_t* lengths;       // [sequences]: tokens, those of the pass included
    const int32_t* block_tables;  // [groups][sequences][table_width]
    const int32_t* selection;     // [selected]: rows in order of their logits
    const int32_t* adapters;      // [sequences]: 0 is none; null where no sequence has any
    int32_t narrows;              // whether the selected rows go on alone where they can (narrow.h)
    int32_t threads;              // that work on it: the tape's run knows

    const int32_t* table(int sequence, int group) const {
        return block_tables + (int64_t(group) * tables + sequence) * table_width;
    }
    const int32_t* table_of(int row, int group) const { return table(sequences[row], group); }
};

// The first position that the row at `position` sees.
inline int first_seen(int position, int window) {
    return window && position >= window ? position + 1 - window : 0;
}

// One layer's part of the cache, in bfloat16, in the order that the dot products read:
//   keys   [blocks][kv_heads][head_dim / 2][16 tokens][2]
//   values [blocks][kv_heads][16 / 2][head_dim][2 tokens]
struct LayerCache {
    uint16_t* keys;
    uint16_t* values;
    int32_t kv_heads, head_dim;
    int32_t group;  // whose block tables are its own

    int64_t tile() const { return int64_t(kBlockTokens) * head_dim; }  // one head of one block
    uint16_t* key_tile(int64_t block, int head) const { return keys + (block * kv_heads + head) * tile(); }
    uint16_t* value_tile(int64_t block, int head) const { return values + (block * kv_heads + head) * tile(); }
};

}  // namespace rivulet
