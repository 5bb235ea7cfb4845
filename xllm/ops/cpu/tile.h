// The arithmetic of attention on one tile: scores of rows with TILE keys, the running softmax, weighted values.
//
// Rows are taken four, two or one at a time so that keys and values are read once for several; the order of each
// row's additions is the same in all three.
#pragma once

#include <algorithm>

#include "vec.h"

constexpr int TILE = 32;
constexpr float NEVER = -1e30f;  // the score of what is not seen

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ACCUMULATORS = 16;  // registers that may accumulate
#else
constexpr int ACCUMULATORS = 8;
#endif

// Rows of keys, values and queries are computed in pieces of two vectors. Of a bfloat16 piece one vector has the numbers
// with even indices and the other those with odd ones: that is how a word comes apart with a shift and a mask.
constexpr int PIECE = 2 * VL;

static inline void load_piece(const float* p, vf* x) {
  x[0] = hold(load(p)), x[1] = hold(load(p + VL));
}
static inline void load_piece(const bf16* p, vf* x) {
  vu words = hold(*(const vu_any*)p);
  x[0] = (vf)(words << 16), x[1] = (vf)(words & 0xffff0000u);
}

// A row of float numbers in the order in which load_piece yields numbers of type E, and back.
template <typename E>
static inline void arrange(const float* from, float* to) {
  vf a = load(from), b = load(from + VL);
  if constexpr (sizeof(E) == 2) {
    store(to, __builtin_shuffle(a, b, 2 * LANE)), store(to + VL, __builtin_shuffle(a, b, 2 * LANE + 1));
  } else {
    store(to, a), store(to + VL, b);
  }
}
template <typename E>
static inline void restore(const float* from, float* to) {
  vf a = load(from), b = load(from + VL);
  if constexpr (sizeof(E) == 2) {
    vi alternate = LANE / 2 + LANE % 2 * VL;
    store(to, __builtin_shuffle(a, b, alternate)), store(to + VL, __builtin_shuffle(a, b, alternate + VL / 2));
  } else {
    store(to, a), store(to + VL, b);
  }
}

// The running softmax of one row: highest score, sum of weights, weighted sum of values.
struct Row {
  float high, total;
  float* values;  // [DP]
};

// Vectors a and b hold segments of `size` lanes, each to be summed; the result holds the segments' folded halves.
template <int SIZE>
static inline vf fold(vf a, vf b) {
  constexpr int HALF = SIZE / 2;
  vi low = LANE / HALF * SIZE + LANE % HALF;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + HALF);
}

// Lane i of the result is sum(x[i]), folded as `sum` folds.
template <int SIZE = VL>
static inline vf sums(vf* x) {
  if constexpr (SIZE == 1) {
    return x[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < SIZE / 2; i++) x[i] = fold<SIZE>(x[2 * i], x[2 * i + 1]);
    return sums<SIZE / 2>(x);
  }
}

constexpr int BETWEEN = 8;  // tokens weighed between two calls of `between`

// Scores of N rows with VL / N tokens.
template <int N, typename E>
__attribute__((noinline)) static void dots(const float* q, const E* const* keys, int64_t dp, float* scores) {
  constexpr int T = VL / N;
  vf acc[N * T] = {};
  for (int64_t d = 0; d < dp; d += PIECE) {
    vf a[N][2];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) a[n][0] = hold(load(q + n * dp + d)), a[n][1] = hold(load(q + n * dp + d + VL));
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
      vf b[2];
      load_piece(keys[t] + d, b);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[n * T + t] += a[n][0] * b[0];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[n * T + t] += a[n][1] * b[1];
    }
  }
  float all[VL];
  store(all, sums(acc));
  for (int n = 0; n < N; n++) memcpy(scores + n * TILE, all + n * T, T * sizeof(float));
}

// values[N rows][P pieces] += scores[N rows][count] * v[count][P pieces], which begin d numbers into each v.
template <int N, int P, typename E, typename F>
static void weigh(const float* scores, const E* const* v, int64_t d, int count, int64_t dp, float* values, F&& between) {
  vf acc[N][2 * P];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int w = 0; w < 2 * P; w++) acc[n][w] = load(values + n * dp + d + w * VL);
  for (int t = 0; t < count; t++) {
    if (t % BETWEEN == 0) between();
    const E* from = v[t] + d;
    vf a[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) a[n] = splat(scores[n * TILE + t]);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      vf b[2];
      load_piece(from + p * PIECE, b);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[n][2 * p] += a[n] * b[0], acc[n][2 * p + 1] += a[n] * b[1];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int w = 0; w < 2 * P; w++) store(values + n * dp + d + w * VL, acc[n][w]);
}

// Scores with the first `count` tokens of a tile, and maybe some more; `between` is called now and then.
template <int N, typename E, typename F>
static void tile_dots(const float* q, const E* const* keys, int count, int64_t dp, float* scores, F&& between) {
  for (int t = 0; t < count; t += VL / N) {
    between();
    dots<N>(q, keys + t, dp, scores + t);
  }
}

template <int N, typename E, typename F>
static void tile_weigh(const float* scores, const E* const* v, int count, int64_t dp, float* values, F&& between) {
  constexpr int P = std::min(4, ACCUMULATORS / (2 * N));
  int64_t d = 0;
  for (; d + P * PIECE <= dp; d += P * PIECE) weigh<N, P>(scores, v, d, count, dp, values, between);
  for (; d < dp; d += PIECE) weigh<N, 1>(scores, v, d, count, dp, values, between);
}

template <typename F4, typename F2, typename F1>
static inline void in_fours(int rows, F4 four, F2 two, F1 one) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) four(r);
  if (r + 2 <= rows) two(r), r += 2;
  if (r < rows) one(r);
}

// Turn the scores of a tile into weights relative to the highest score so far, which may rise. Positions outside
// [begin, end) of the tile are not seen.
__attribute__((noinline)) static void soften(Row& row, float* scores, int begin, int end, int64_t dp) {
  vf s[TILE / VL], high = splat(NEVER);
  for (int i = 0; i < TILE / VL; i++) {
    vi at = LANE + i * VL;
    s[i] = (at >= begin) & (at < end) ? load(scores + i * VL) : splat(NEVER);
    high = larger(high, s[i]);
  }
  float highest = std::max(row.high, largest(high));
  vf total = {};
  for (int i = 0; i < TILE / VL; i++) {
    vf weight = s[i] == splat(NEVER) ? vf{} : exp(s[i] - highest);
    total += weight;
    store(scores + i * VL, weight);
  }
  vf shrink = exp(splat(row.high - highest));  // often exactly 1, but that cannot be predicted
  for (int64_t d = 0; d < dp; d += VL) store(row.values + d, load(row.values + d) * shrink);
  row.total = row.total * shrink[0] + sum(total);
  row.high = highest;
}

// whole = whole and part together.
__attribute__((noinline)) static void merge(Row& whole, const Row& part, int64_t dp) {
  if (part.high == NEVER) return;
  float high = std::max(whole.high, part.high);
  vf a = exp(splat(whole.high - high)), b = exp(splat(part.high - high));
  for (int64_t d = 0; d < dp; d += VL) {
    vf weighed = load(part.values + d) * b;
    store(whole.values + d, load(whole.values + d) * a + weighed);
  }
  float weighed = part.total * b[0];
  whole.total = whole.total * a[0] + weighed;
  whole.high = high;
}
