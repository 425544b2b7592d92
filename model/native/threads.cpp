#include "threads.h"

#include <immintrin.h>
#include <sched.h>

#include <system_error>

namespace rivulet {
namespace {

// Long enough for the others' last task, short enough that a thread without a core of its own gives way.
constexpr int kSpins = 2000;

// Rounds of a millisecond last for 34 years; no work has so many tasks.
constexpr int kTaskBits = 24;

uint64_t packed(uint64_t round, int64_t tasks) { return round << kTaskBits | uint64_t(tasks); }
uint64_t round_of(uint64_t packed) { return packed >> kTaskBits; }
int64_t tasks_of(uint64_t packed) { return int64_t(packed & ((uint64_t(1) << kTaskBits) - 1)); }

}  // namespace

Crew::Crew(int threads) {
    try {
        for (int i = 1; i < threads; i++) others_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {
        // The system gives no more threads: those that are there do the work.
    }
}

Crew::~Crew() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : others_) thread.join();
}

void Crew::run(const Work* const* work, int64_t count) {
    Round round;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (count > capacity_) {
            if (capacity_) outgrown_.push_back(std::move(board_));
            board_.progress.reset(new Progress[count]);
            board_.taken.reset(new Taken[count * size()]);
            capacity_ = count;
        }
        round = round_ = {round_.number + 1, work, count, board_.progress.get(), board_.taken.get(), size()};
        for (int64_t i = 0; i < count; i++) {
            round.progress[i].done.store(packed(round.number, 0));
            round.progress[i].end.store(packed(round.number, work[i]->tasks()));
        }
    }
    if (!others_.empty()) wake_.notify_all();
    work_through(round, 0);
}

void Crew::serve(int self) {
    uint64_t seen = 0;
    for (;;) {
        Round round;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stopping_ || round_.number != seen; });
            if (stopping_) return;
            round = round_;
            seen = round.number;
        }
        work_through(round, self);
    }
}

// The next task of a share of `size`, or -1. The count of an earlier round stands for none. It is there only until the
// first task is taken, so who is late for a round that is over finds the last of its own counts, or a later round's.
int64_t Crew::take(Counter& taken, uint64_t round, int64_t size) {
    uint64_t last = taken.load(std::memory_order_acquire);
    for (;;) {
        const int64_t count = round_of(last) == round ? tasks_of(last) : 0;
        if (round_of(last) > round || count >= size) return -1;
        if (taken.compare_exchange_weak(last, packed(round, count + 1), std::memory_order_acq_rel)) return count;
    }
}

void Crew::work_through(const Round& round, int self) {
    for (int64_t index = 0; index < round.count; index++) {
        Progress& progress = round.progress[index];
        const uint64_t end = progress.end.load(std::memory_order_acquire);
        if (round_of(end) != round.number) return;  // the round is over
        const auto start_of = [&](int share) { return tasks_of(end) * share / round.shares; };
        for (int i = 0; i < round.shares; i++) {
            const int share = (self + i) % round.shares;
            const int64_t first = start_of(share), size = start_of(share + 1) - first;
            Counter& taken = round.taken[index * round.shares + share].count;
            for (int64_t task; (task = take(taken, round.number, size)) >= 0;) {
                round.work[index]->run(first + task);
                progress.done.fetch_add(1, std::memory_order_acq_rel);
            }
        }
        for (int spins = 0;; spins++) {
            const uint64_t done = progress.done.load(std::memory_order_acquire);
            if (done == end) break;
            if (round_of(done) != round.number) return;
            if (spins < kSpins)
                _mm_pause();
            else
                sched_yield();
        }
    }
}

}  // namespace rivulet
