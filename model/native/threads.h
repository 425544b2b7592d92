// The threads of a step: a crew that works through one list of tasks after another.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace rivulet {

// Something that is done in independent tasks, by whoever is free. How tasks are cut must not show in the result.
struct Work {
    virtual ~Work() = default;
    virtual int64_t tasks() const = 0;
    virtual void run(int64_t task) const = 0;
};

// The caller is one of the crew. A piece of work is over when its tasks are done, not when everybody has
// arrived: a thread that the system keeps waiting is not waited for, unless it is within a task. Between runs
// the others sleep, so an idle server uses no processor.
class Crew {
  public:
    explicit Crew(int threads);
    ~Crew();
    // Do all of `work` in order; returns when everything is done.
    void run(const Work* const* work, int64_t count);
    int size() const { return int(others_.size()) + 1; }

  private:
    // Round number in the upper half, tasks in the lower: who is late for a round takes nothing of the next, and
    // looks at no work that may be gone.
    struct alignas(64) Progress {
        std::atomic<uint64_t> taken{0};
        std::atomic<uint64_t> done{0};
        std::atomic<uint64_t> end{0};
    };
    struct Round {
        uint32_t number = 0;
        const Work* const* work = nullptr;
        int64_t count = 0;
        Progress* progress = nullptr;
    };

    void serve();
    void work_through(const Round& round);

    std::unique_ptr<Progress[]> progress_;
    int64_t capacity_ = 0;
    Round round_;  // guarded by mutex_, as the next two
    bool stopping_ = false;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::unique_ptr<Progress[]>> outgrown_;  // somebody late may still look at them
    std::vector<std::thread> others_;
};

}  // namespace rivulet
