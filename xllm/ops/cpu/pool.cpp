#include "pool.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting awake costs a core but waking takes longer than most operators. A waiting thread first keeps its core, then
// offers it to whoever wants it, and sleeps after what may pass between two steps.
constexpr int EAGER = 500;
constexpr auto AWAKE = std::chrono::milliseconds(2);

inline void pause(int spins) {
  if (spins < EAGER) relax();
  else std::this_thread::yield();
}

class Pool {
 public:
  void run(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> alone(caller_, std::try_to_lock);
    if (!alone.owns_lock()) {  // another thread's model is at it: work by ourselves
      for (int64_t i = 0; i < count; i++) body(context, i);
      return;
    }
    while ((int)helpers_.load() < threads - 1) start_helper();
    body_ = body, context_ = context, count_ = count, wanted_ = threads - 1;
    next_.store(0);
    turn_.fetch_add(1);  // odd: open
    turn_.notify_all();
    work();
    turn_.fetch_add(1);  // even: closed; who is not inside by now stays outside
    for (int spins = 0; inside_.load() > 0; spins++) pause(spins);
  }

 private:
  void start_helper() {
    int index = helpers_.fetch_add(1);
    std::thread([this, index] { help(index); }).detach();
  }

  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body_(context_, i);
  }

  void help(int index) {
    uint32_t seen = 0;
    for (;;) {
      uint32_t turn = await(seen);
      // Either the caller sees us inside and waits, or we see that it has closed the turn and touch nothing.
      inside_.fetch_add(1);
      if (turn_.load() == turn && index < wanted_) work();
      inside_.fetch_sub(1);
      seen = turn;
    }
  }

  // An open turn other than `seen`: awake for a while, then asleep.
  uint32_t await(uint32_t seen) {
    auto since = std::chrono::steady_clock::now();
    for (int spins = 0;; spins++) {
      uint32_t turn = turn_.load();
      if (turn % 2 && turn != seen) return turn;
      if (spins % 64 || std::chrono::steady_clock::now() - since < AWAKE) pause(spins);
      else turn_.wait(turn);
    }
  }

  std::mutex caller_;
  std::atomic<int> helpers_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> inside_{0};
  // of the open turn
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  int wanted_ = 0;
};

}  // namespace

void share(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
  static Pool* pool = new Pool;  // never destroyed: its threads sleep until the process ends
  pool->run(count, threads, body, context);
}
