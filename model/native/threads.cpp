#include "threads.h"

#include <immintrin.h>
#include <sched.h>

#include <system_error>

namespace rivulet {
namespace {

// Long enough for the others' last task, short enough that a thread without a core of its own gives way.
constexpr int kSpins = 2000;

uint64_t progress_of(uint32_t round, int64_t tasks) { return uint64_t(round) << 32 | uint64_t(tasks); }

}  // namespace

Crew::Crew(int threads) {
    try {
        for (int i = 1; i < threads; i++) others_.emplace_back([this] { serve(); });
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
            if (progress_) outgrown_.push_back(std::move(progress_));
            progress_.reset(new Progress[count]);
            capacity_ = count;
        }
        round = round_ = {round_.number + 1, work, count, progress_.get()};
        for (int64_t i = 0; i < count; i++) {
            Progress& progress = round.progress[i];
            progress.end.store(progress_of(round.number, work[i]->tasks()));
            progress.done.store(progress_of(round.number, 0));
            progress.taken.store(progress_of(round.number, 0));
        }
    }
    if (!others_.empty()) wake_.notify_all();
    work_through(round);
}

void Crew::serve() {
    uint32_t seen = 0;
    for (;;) {
        Round round;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stopping_ || round_.number != seen; });
            if (stopping_) return;
            round = round_;
            seen = round.number;
        }
        work_through(round);
    }
}

void Crew::work_through(const Round& round) {
    for (int64_t index = 0; index < round.count; index++) {
        Progress& progress = round.progress[index];
        uint64_t taken = progress.taken.load(std::memory_order_acquire);
        const uint64_t end = progress.end.load(std::memory_order_acquire);
        if (taken >> 32 != round.number || end >> 32 != round.number) return;  // the round is over
        while (taken < end) {
            if (!progress.taken.compare_exchange_weak(taken, taken + 1, std::memory_order_acq_rel)) {
                if (taken >> 32 != round.number) return;
                continue;
            }
            round.work[index]->run(int64_t(uint32_t(taken)));
            progress.done.fetch_add(1, std::memory_order_acq_rel);
            taken++;
        }
        for (int spins = 0;; spins++) {
            const uint64_t done = progress.done.load(std::memory_order_acquire);
            if (done == end) break;
            if (done >> 32 != round.number) return;
            if (spins < kSpins)
                _mm_pause();
            else
                sched_yield();
        }
    }
}

}  // namespace rivulet
