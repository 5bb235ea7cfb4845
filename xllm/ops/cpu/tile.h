// The arithmetic of attention on one tile: scores of rows with TILE keys, the running softmax, weighted values.
//
// Rows are taken four, two or one at a time so that keys and values are read once for several; the order of each
// row's additions is the same in all three.
#pragma once

#include <algorithm>

#include "vec.h"

constexpr int TILE = 32;
constexpr float NEVER = -1e30f;  // the score of what is not seen

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

// Scores of N rows with VL / N tokens at k.
template <int N>
static void dots(const float* q, const float* k, int64_t dp, float* scores) {
  constexpr int T = VL / N;
  vf acc[N * T] = {};
  for (int64_t d = 0; d < dp; d += VL) {
    vf a[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) a[n] = hold(load(q + n * dp + d));
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
      vf b = hold(load(k + t * dp + d));
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[n * T + t] += a[n] * b;
    }
  }
  float all[VL];
  store(all, sums(acc));
  for (int n = 0; n < N; n++) memcpy(scores + n * TILE, all + n * T, T * sizeof(float));
}

// values[N rows][W vectors] += scores[N rows][TILE] * v[TILE][W vectors]
template <int N, int W>
static void weigh(const float* scores, const float* v, int64_t dp, float* values) {
  vf acc[N][W];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) acc[n][w] = load(values + n * dp + w * VL);
  for (int t = 0; t < TILE; t++) {
    vf b[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) b[w] = hold(load(v + t * dp + w * VL));
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      vf a = splat(scores[n * TILE + t]);
#pragma GCC unroll 4
      for (int w = 0; w < W; w++) acc[n][w] += a * b[w];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) store(values + n * dp + w * VL, acc[n][w]);
}

template <int N>
static void tile_dots(const float* q, const float* k, int64_t dp, float* scores) {
  for (int t = 0; t < TILE; t += VL / N) dots<N>(q, k + t * dp, dp, scores + t);
}

template <int N>
static void tile_weigh(const float* scores, const float* v, int64_t dp, float* values) {
  int64_t d = 0;
  for (; d + 4 * VL <= dp; d += 4 * VL) weigh<N, 4>(scores, v + d, dp, values + d);
  for (; d < dp; d += VL) weigh<N, 1>(scores, v + d, dp, values + d);
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
  if (highest != row.high) {
    vf shrink = exp(splat(row.high - highest));
    for (int64_t d = 0; d < dp; d += VL) store(row.values + d, load(row.values + d) * shrink);
    row.total *= shrink[0];
    row.high = highest;
  }
  row.total += sum(total);
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
