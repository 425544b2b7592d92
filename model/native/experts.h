// A mixture of experts as work for the crew; see experts.cpp.
#pragma once
#include <vector>

#include "pass.h"
#include "products.h"
#include "threads.h"

namespace rivulet {

// What chooses each row's experts: a softmax over all of them, from numbers in float32 throughout, since a small
// error here is a wrong expert.
struct Router {
    const float* rows;       // [rows][inputs]
    const float* norm;       // [inputs]: weights of the rows' RMS norm, or null where they are taken as they are
    const float* weight;     // [experts][inputs]
    float epsilon;           // the norm's
    int32_t inputs, experts;
    int32_t per_token;       // so many are chosen for a row
    int32_t normalised;      // whether their shares are scaled to a sum of one
};

// Who computes what in one pass. A place is a row with one of its experts; an expert's places stand together, the
// experts in order of their numbers, an expert's rows in their order.
struct Routing {
    float* logits;    // [rows][experts]
    int32_t* chosen;  // [rows][per_token]: experts, the most probable first
    float* shares;    // [rows][per_token]
    int32_t* rows;    // [rows * per_token]: of each place
    float* weights;   // [rows * per_token]: of each place, its row's share
    int32_t* active;  // [experts]: those that have places
    int32_t* starts;  // [experts + 1]: the first place of each active one, and an end
    int32_t* count;   // how many are active
};

// Logits of all experts.
struct RouterLogits : Work {
    RouterLogits(const Pass& pass, Router router, Routing to) : pass(pass), router(router), to(to) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Router router;
    const Routing to;
};

// Each row's experts and their shares.
struct Choose : Work {
    Choose(const Pass& pass, Router router, Routing to) : pass(pass), router(router), to(to) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Router router;
    const Routing to;
};

// The places of each expert; and where there are few of them, what comes before and after.
struct Group : Work {
    Group(const Pass& pass, Router router, Routing to, InputRows in, InputRows gathered)
        : pass(pass), router(router), to(to), in(in), gathered(gathered) {}
    int64_t tasks() const override { return 1; }
    void run(int64_t task) const override;
    const Pass& pass;
    const Router router;
    const Routing to;
    const InputRows in, gathered;
};

// gathered[place] = in[row of the place].
struct Gather : Work {
    Gather(const Pass& pass, Router router, Routing by, InputRows in, InputRows gathered)
        : pass(pass), router(router), by(by), in(in), gathered(gathered) {}
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Router router;
    const Routing by;
    const InputRows in, gathered;
};

// out[place] = activation(gate) * up of the place's expert.
struct GatedExperts : Work {
    GatedExperts(const Pass& pass, Router router, Routing by, InputRows in, std::vector<Panels> gates,
                 std::vector<Panels> ups, Activation activation, InputRows out);
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Router router;
    const Routing by;
    const InputRows in;
    const std::vector<Panels> gates, ups;  // by expert
    const Activation activation;
    const InputRows out;
};

// out[row] = multiplier * its experts' outputs, each by its share, or that added to what is there.
struct MixExperts : Work {
    MixExperts(const Pass& pass, Router router, Routing by, InputRows in, std::vector<Panels> downs, float multiplier,
               float* out, bool accumulate);
    int64_t tasks() const override;
    void run(int64_t task) const override;
    const Pass& pass;
    const Router router;
    const Routing by;
    const InputRows in;  // by place
    const std::vector<Panels> downs;
    const float multiplier;
    float* const out;  // [rows][outputs]
    const bool accumulate;
};

}  // namespace rivulet
