// Each cut is a threshold on a token's weight, exp((logit - largest) / temperature), or on its distance from the
// expected one, as in model/ops/sampling.py: tokens that tie at a threshold stay together, and the draw runs over the
// vocabulary in its own order.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

namespace rivulet {
namespace {

constexpr int64_t kPart = 4096;               // tokens that are summarised at a time: they stay in the first-level cache
constexpr size_t kChunk = kLanes;             // tokens whose largest weight, or whose sum, stands for them
constexpr int64_t kNucleus[] = {256, 2048};  // tokens that are ranked for top-p, before all are counted

// Sixteen from `i` on; past the end the lanes are `other`.
Floats load_some(const float* x, int64_t i, int64_t size, float other) {
    if (i + kLanes <= size) return Floats::load(x + i);
    alignas(64) float lanes[kLanes];
    for (int64_t j = 0; j < kLanes; j++) lanes[j] = i + j < size ? x[i + j] : other;
    return Floats::load(lanes);
}

float largest_of(const float* x, int64_t size) {
    Floats most = Floats::all(-INFINITY);
    for (int64_t i = 0; i < size; i += kLanes) most = max(most, load_some(x, i, size, -INFINITY));
    return max(most);
}

// At least the `count` largest weights, best first: all that reach the count-th largest chunk maximum, which is
// no larger than the count-th largest weight; none below the floor.
void rank(const std::vector<float>& weights, const std::vector<float>& maxima, float floor, int64_t count,
          std::vector<float>& ranked) {
    thread_local std::vector<float> order;
    ranked.clear();
    float bound = floor;
    if (int64_t(maxima.size()) > count) {
        order = maxima;
        std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<float>());
        bound = std::max(bound, order[size_t(count - 1)]);
    }
    for (size_t c = 0; c < maxima.size(); c++)
        if (maxima[c] >= bound)
            for (size_t i = c * kChunk; i < (c + 1) * kChunk; i++)
                if (weights[i] >= bound && weights[i] > 0) ranked.push_back(weights[i]);
    std::sort(ranked.begin(), ranked.end(), std::greater<float>());
}

void drop_below(std::vector<float>& weights, float floor) {
    for (float& w : weights) w = w < floor ? 0.0f : w;
}

// The sum of the weights that reach the floor, and of those of each chunk.
double total_of(const std::vector<float>& weights, float floor, std::vector<float>& shares) {
    const Floats least = Floats::all(floor), zero = Floats::zero();
    double total = 0;
    shares.resize(weights.size() / kChunk);
    for (size_t c = 0; c < shares.size(); c++) {
        const Floats w = Floats::load(&weights[c * kChunk]);
        shares[c] = sum(select_negative(w - least, zero, w));
        total += shares[c];
    }
    return total;
}

// The weight of the last token of the smallest set that reaches the share of the total; negative if the ranked
// ones do not reach it.
float nucleus_floor(const std::vector<float>& ranked, double needed) {
    double sum = 0;
    for (const float w : ranked)
        if ((sum += w) >= needed) return w;
    return -1;
}

// The key of the last token that is needed when tokens are taken by their key, the largest first or the smallest,
// until their weights reach what is needed. Keys are not negative, so their bits rank as they do: a histogram by the
// upper ones (a sixteenth of an octave each) finds the bucket in which that is, and only that one is sorted.
template <bool kLargestFirst>
float last_needed(const std::vector<float>& keys, const std::vector<float>& weights, double needed) {
    constexpr int kBuckets = 1 << 12;
    thread_local std::vector<double> shares;
    thread_local std::vector<std::pair<float, float>> ranked;  // (key, weight)
    const size_t size = weights.size();
    const auto bucket_of = [](float key) {
        uint32_t bits;
        std::memcpy(&bits, &key, 4);
        return int(kLargestFirst ? kBuckets - 1 - (bits >> 19) : bits >> 19);
    };
    shares.assign(kBuckets, 0);
    for (size_t i = 0; i < size; i++)
        if (weights[i] > 0) shares[size_t(bucket_of(keys[i]))] += weights[i];
    int last = 0;
    for (int bucket = 0; bucket < kBuckets; bucket++) {
        if (shares[size_t(bucket)] == 0) continue;
        last = bucket;
        if (shares[size_t(bucket)] >= needed) break;
        needed -= shares[size_t(bucket)];
    }
    ranked.clear();
    for (size_t i = 0; i < size; i++)
        if (weights[i] > 0 && bucket_of(keys[i]) == last) ranked.emplace_back(keys[i], weights[i]);
    if (kLargestFirst)
        std::sort(ranked.begin(), ranked.end(), std::greater<>());
    else
        std::sort(ranked.begin(), ranked.end());
    float key = 0;
    for (const auto& [next, weight] : ranked) {
        key = next;
        if ((needed -= weight) <= 0) break;
    }
    return key;
}

// Keep the smallest set of tokens closest to the expected information that has its share of the total
// (arXiv:2202.00666). With w = exp(x), -log p - H = E[x] - x: the normaliser cancels out.
void keep_typical(const float* logits, int64_t size, float most, const Draw& draw, std::vector<float>& weights) {
    thread_local std::vector<float> distances;
    distances.assign(weights.size(), 0);
    double total = 0, moment = 0;
    for (int64_t i = 0; i < size; i++) distances[size_t(i)] = (logits[i] - most) / draw.temperature;
    for (size_t i = 0; i < weights.size(); i++)
        if (weights[i] > 0) {
            total += weights[i];
            moment += double(weights[i]) * distances[i];
        }
    const float expected = float(moment / total);
    for (float& x : distances) x = std::fabs(x - expected);
    const float furthest = last_needed<false>(distances, weights, double(draw.typical_p) * total);
    for (size_t i = 0; i < weights.size(); i++) weights[i] = distances[i] > furthest ? 0.0f : weights[i];
}

// exp((logit - most) / temperature) in whole chunks, and the largest of each; past the end there is no weight.
void weigh(const float* logits, int64_t size, float most, float temperature, std::vector<float>& weights,
           std::vector<float>& maxima) {
    const Floats largest = Floats::all(most), divisor = Floats::all(temperature);
    maxima.resize(size_t((size + kChunk - 1) / kChunk));
    weights.resize(maxima.size() * kChunk);
    for (size_t c = 0; c < maxima.size(); c++) {
        const Floats x = (load_some(logits, int64_t(c) * kChunk, size, -INFINITY) - largest) / divisor;
        // The exponential ends at e^-87; a token that is masked out (minus infinity) must have no weight at all.
        const Floats w = select_negative(x + Floats::all(87.0f), Floats::zero(), exp(x));
        w.store(&weights[c * kChunk]);
        maxima[c] = max(w);
    }
}

// The token at which the weights so far pass a share of all: a look at the chunks, then at the tokens of one.
int64_t invert(const std::vector<float>& weights, float floor, double uniform, std::vector<float>& shares) {
    const double threshold = uniform * total_of(weights, floor, shares);
    double sum = 0, before = 0;
    size_t chunk = 0;
    for (size_t c = 0; c < shares.size() && sum <= threshold; c++)
        if (shares[c] > 0) {
            chunk = c;
            before = sum;
            sum += shares[c];
        }
    sum = before;
    int64_t last = 0;
    for (size_t i = chunk * kChunk; i < (chunk + 1) * kChunk; i++)
        if (weights[i] > 0 && weights[i] >= floor) {
            last = int64_t(i);
            if ((sum += weights[i]) > threshold) break;
        }
    return last;
}

int64_t draw_token(const float* logits, int64_t size, const Draw& draw) {
    thread_local std::vector<float> weights, maxima, ranked, shares;
    const float most = largest_of(logits, size);
    weigh(logits, size, most, draw.temperature, weights, maxima);
    float floor = 0;  // what the cuts so far ask of a weight
    if (draw.top_k && draw.top_k < size) {
        rank(weights, maxima, floor, draw.top_k, ranked);
        // A constraint may have left fewer; those all stay.
        if (ranked.size() >= size_t(draw.top_k)) floor = ranked[size_t(draw.top_k - 1)];
    }
    if (draw.top_p < 1) {
        const double needed = double(draw.top_p) * total_of(weights, floor, shares);
        float least = -1;
        for (const int64_t count : kNucleus) {
            rank(weights, maxima, floor, count, ranked);
            least = nucleus_floor(ranked, needed);
            if (least >= 0) break;
        }
        if (least < 0) {
            drop_below(weights, floor);
            least = last_needed<true>(weights, weights, needed);
        }
        floor = std::max(floor, least);
    }
    floor = std::max(floor, draw.min_p);
    if (draw.typical_p < 1) {
        drop_below(weights, floor);
        keep_typical(logits, size, most, draw, weights);
    }
    return invert(weights, floor, draw.uniform, shares);
}

}  // namespace

SummariseParts::SummariseParts(const int32_t& rows, const float* logits, int64_t stride, int64_t size, int64_t most_rows)
    : rows(rows), logits(logits), stride(stride), size(size), parts((size + kPart - 1) / kPart),
      summaries(size_t(most_rows * parts)) {}

void SummariseParts::run(int64_t task) const {
    const int64_t start = task % parts * kPart, count = std::min(size - start, kPart);
    const float* x = logits + task / parts * stride + start;
    const float most = largest_of(x, count);
    Floats sums = Floats::zero();
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats e = exp(load_some(x, i, count, -INFINITY) - Floats::all(most));
        sums = sums + (i + kLanes <= count ? e : only(e, 0, int(count - i), 0.0f));
    }
    summaries[size_t(task)] = {most, sum(sums)};
}

void Summarise::run(int64_t row) const {
    const Summary* part = &parts.summaries[size_t(row * parts.parts)];
    int64_t where = 0;
    for (int64_t i = 1; i < parts.parts; i++)
        if (part[i].largest > part[where].largest) where = i;
    const float most = part[where].largest;
    float total = 0;
    for (int64_t i = 0; i < parts.parts; i++) total += part[i].sum * std::exp(part[i].largest - most);
    const float* x = parts.logits + row * parts.stride;
    const float* start = x + where * kPart;
    // Where there are numbers that are none the largest may not be found: still a token.
    const float* found = std::find(start, std::min(start + kPart, x + parts.size), most);
    best[row] = std::min<int64_t>(found - x, parts.size - 1);
    log_sum_exp[row] = most + std::log(total);
}

void Sample::run(int64_t task) const {
    const Draw& draw = draws[task];
    tokens[task] = draw_token(logits + draw.row * stride, size, draw);
}

}  // namespace rivulet
