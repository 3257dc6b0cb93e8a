// A few threads that run one function together and meet between its phases. They wait for each other awake for a
// moment, then asleep, and sleep when nothing is asked of them.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace abyssal {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Until `word` is no longer `old`: awake for up to `awake`, then asleep.
inline void wait_for_change(std::atomic<uint32_t>& word, uint32_t old, std::chrono::microseconds awake) {
    for (int i = 0; i < 200; i++) {
        if (word.load(std::memory_order_acquire) != old) return;
        relax();
    }
    const auto end = std::chrono::steady_clock::now() + awake;
    while (std::chrono::steady_clock::now() < end)
        for (int i = 0; i < 50; i++) {
            if (word.load(std::memory_order_acquire) != old) return;
            relax();
        }
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

class Team {
  public:
    explicit Team(int n) : n_(n), pid_(getpid()), places_(n) {
        for (int i = 1; i < n; i++) threads_.emplace_back([this, i] { work(i); });
    }
    ~Team() {
        if (pid_ != getpid()) {  // a fork has only the thread that forked: there is nobody to join
            for (auto& thread : threads_) thread.detach();
            return;
        }
        stop_ = true;
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return n_; }
    bool is_ours() const { return pid_ == getpid(); }

    // `job(thread)` on every thread; returns when all have done it.
    template <class Job>
    void run(Job& job) {
        if (n_ == 1) {
            job(0);
            return;
        }
        call_ = [](void* job, int thread) { (*static_cast<Job*>(job))(thread); };
        job_ = &job;
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        job(0);
        meet();
    }

    // Each of `n_items`, then everybody waits for the last. A thread takes its own share of neighbours one after the
    // other, then from the ends of others' shares; so who does an item is left to chance, and no result may depend on it.
    template <class Work>
    void each(int thread, int64_t n_items, const Work& work) {
        if (n_ == 1) {
            for (int64_t i = 0; i < n_items; i++) work(i);
            return;
        }
        for (int i = 0; i < n_; i++)
            for (int64_t item; (item = take((thread + i) % n_, n_items, i > 0)) >= 0;) work(item);
        meet();
    }

  private:
    // What is left of a thread's share: from `begin` to `end`, or nothing said yet.
    struct Share {
        uint32_t begin, end;
    };
    static constexpr Share UNTOUCHED{1, 0};

    // An item of some thread's share, its first or its last; -1: nothing is left.
    int64_t take(int of, int64_t n_items, bool last) {
        std::atomic<Share>& share = places_[of].share;
        Share seen = share.load(std::memory_order_relaxed), left;
        do {
            left = seen;
            if (left.begin > left.end) left = {uint32_t(n_items * of / n_), uint32_t(n_items * (of + 1) / n_)};
            if (left.begin == left.end) return -1;
            if (last) left.end--;
            else left.begin++;
        } while (!share.compare_exchange_weak(seen, left, std::memory_order_relaxed));
        return last ? left.end : left.begin - 1;
    }
    void meet() {
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            for (Place& place : places_) place.share.store(UNTOUCHED, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
        } else {
            wait_for_change(round_, round, std::chrono::microseconds(100));
        }
    }
    void work(int thread) {
        uint32_t seen = 0;
        while (true) {
            wait_for_change(generation_, seen, std::chrono::microseconds(500));
            seen = generation_.load(std::memory_order_acquire);
            if (stop_) return;
            call_(job_, thread);
            meet();
        }
    }

    const int n_;
    const pid_t pid_;
    struct alignas(64) Place {
        std::atomic<Share> share{UNTOUCHED};
    };
    std::vector<Place> places_;
    std::vector<std::thread> threads_;
    void (*call_)(void*, int) = nullptr;
    void* job_ = nullptr;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
};

}  // namespace abyssal
