// What sampling needs of a row of logits without sorting it; see sampling.cpp.
#pragma once
#include <vector>

#include "threads.h"
#include "vector.h"

namespace rivulet {

// One row's draw; the fields are those of SamplingParams (model/batch.py), uniform is in [0, 1).
struct Draw {
    int32_t row;
    int32_t top_k;  // 0 is off
    float temperature, top_p, min_p, typical_p;
    double uniform;
};

// What is known of a part of a row: its largest logit, and the sum of the exponentials beside that.
struct Summary {
    float largest, sum;
};

// A summary of each part of each row: so many threads can share a single row.
struct SummariseParts : Work {
    SummariseParts(const int32_t& rows, const float* logits, int64_t stride, int64_t size, int64_t most_rows);
    int64_t tasks() const override { return rows * parts; }
    void run(int64_t task) const override;
    const int32_t& rows;
    const float* const logits;
    const int64_t stride, size, parts;
    mutable std::vector<Summary> summaries;  // [rows][parts]
};

// From them the best token of each row, and the logarithm of the sum of all exponentials.
struct Summarise : Work {
    Summarise(const SummariseParts& parts, int64_t* best, float* log_sum_exp)
        : parts(parts), best(best), log_sum_exp(log_sum_exp) {}
    int64_t tasks() const override { return parts.rows; }
    void run(int64_t row) const override;
    const SummariseParts& parts;
    int64_t* const best;
    float* const log_sum_exp;
};

// A token for each draw.
struct Sample : Work {
    Sample(const float* logits, int64_t stride, int64_t size, const Draw* draws, int64_t count, int64_t* tokens)
        : logits(logits), stride(stride), size(size), draws(draws), count(count), tokens(tokens) {}
    int64_t tasks() const override { return count; }
    void run(int64_t task) const override;
    const float* const logits;
    const int64_t stride, size;
    const Draw* const draws;
    const int64_t count;
    int64_t* const tokens;
};

}  // namespace rivulet
