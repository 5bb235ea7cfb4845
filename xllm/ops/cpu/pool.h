// Work shared among threads: the caller works, and whoever of the pool is awake and on a core helps.
//
// Unlike an OpenMP team nobody waits for a thread that has not begun: on a busy machine the kernel may leave a helper
// waiting for a core for milliseconds, and the caller simply does its share too. On few cores, where servers and
// tokenisers run beside the model, that decides.
#pragma once

#include <algorithm>
#include <cstdint>

// body(context, i) once for each i in [0, count), by up to `threads` threads, the caller among them.
void share(int64_t count, int threads, void (*body)(void*, int64_t), void* context);

template <typename F>
inline void each(int64_t count, int threads, F&& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; i++) body(i);
  } else {
    share(count, threads, [](void* context, int64_t i) { (*(F*)context)(i); }, &body);
  }
}

// body(i) for each of `rows` rows of `width` numbers, in runs long enough to be worth a thread's while.
template <typename F>
inline void each_row(int64_t rows, int64_t width, int threads, F&& body) {
  int64_t run = std::max<int64_t>(1, (1 << 13) / width);
  each((rows + run - 1) / run, threads, [&](int64_t r) {
    for (int64_t i = r * run; i < std::min(rows, (r + 1) * run); i++) body(i);
  });
}
