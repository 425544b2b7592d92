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

// The caller is one of the crew. Everybody has a share of a piece of work, tasks in a row, so that what lies in a row in
// memory is read so, and takes from the others' when that is done. A piece of work is over when its tasks are done, not
// when everybody has arrived: a thread that the system keeps waiting is not waited for, unless it is within a task.
// Between runs the others sleep, so an idle server uses no processor.
class Crew {
  public:
    explicit Crew(int threads);
    ~Crew();
    // Do all of `work` in order; returns when everything is done.
    void run(const Work* const* work, int64_t count);
    int size() const { return int(others_.size()) + 1; }

  private:
    // A round's number and how many tasks: who is late for a round takes nothing of the next, and looks at no work that
    // may be gone.
    using Counter = std::atomic<uint64_t>;
    struct alignas(64) Progress {
        Counter end{0}, done{0};
    };
    struct alignas(64) Taken {  // of one share
        Counter count{0};
    };
    struct Board {
        std::unique_ptr<Progress[]> progress;  // [capacity]
        std::unique_ptr<Taken[]> taken;        // [capacity][shares]
    };
    struct Round {
        uint64_t number = 0;
        const Work* const* work = nullptr;
        int64_t count = 0;
        Progress* progress = nullptr;  // [count]
        Taken* taken = nullptr;        // [count][shares]
        int shares = 0;
    };

    void serve(int self);
    void work_through(const Round& round, int self);
    static int64_t take(Counter& taken, uint64_t round, int64_t size);

    Board board_;
    int64_t capacity_ = 0;
    Round round_;  // guarded by mutex_, as the next two
    bool stopping_ = false;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<Board> outgrown_;  // somebody late may still look at them
    std::vector<std::thread> others_;
};

}  // namespace rivulet
