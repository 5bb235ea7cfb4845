// Operators that work on each token's row by itself: norms, gated activation, norm + rotary + KV write.
//
// A row is computed by one thread in one fixed order: results are bitwise independent of the batch.
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "vec.h"

namespace {

float mean_square(const float* x, int64_t n) {
  vf even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    vf a = load(x + i), b = load(x + i + VL);
    even += a * a;
    odd += b * b;
  }
  float total = sum(even + odd);
  for (; i < n; i++) total += x[i] * x[i];
  return total / n;
}

void scale_row(const float* x, const float* weight, float factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(y + i, load(x + i) * factor * load(weight + i));
  for (; i < n; i++) y[i] = x[i] * factor * weight[i];
}

void add_row(float* x, const float* y, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(x + i, load(x + i) + load(y + i));
  for (; i < n; i++) x[i] += y[i];
}

vf silu(vf x) { return x / (1.f + exp(-larger(x, splat(-88.f)))); }

void silu_row(const float* gate, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(y + i, silu(load(gate + i)) * load(up + i));
  if (i == n) return;
  float tail[3][VL] = {};
  std::copy_n(gate + i, n - i, tail[0]);
  std::copy_n(up + i, n - i, tail[1]);
  store(tail[2], silu(load(tail[0])) * load(tail[1]));
  std::copy_n(tail[2], n - i, y + i);
}

// Turn feature i with feature i + half by the angle whose cosine and sine are given.
void rotate(float* __restrict x, const float* __restrict cosine, const float* __restrict sine, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

template <typename KV>
void copy_head(const float* from, KV* to, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  for (; i < n; i++) narrow(to + i, from[i]);
}

// One token's queries, keys and values; `cache` points at the layer in block 0.
struct Rope {
  float* qkv;
  const int64_t* positions;
  const float* cos_sin;
  const float *q_norm, *k_norm;  // null: none
  float eps;
  const int64_t* slots;
  int64_t T, Q, H, D, R;
  int64_t block_stride, block_size;
};

template <typename KV>
void rope_token(const Rope& p, KV* cache, int64_t t) {
  float* row = p.qkv + t * (p.Q + 2 * p.H) * p.D;
  const float* cosine = p.cos_sin + p.positions[t] * p.R;
  for (int64_t h = 0; h < p.Q + p.H; h++) {
    float* head = row + h * p.D;
    if (p.q_norm) scale_row(head, h < p.Q ? p.q_norm : p.k_norm, 1.f / std::sqrt(mean_square(head, p.D) + p.eps), head, p.D);
    rotate(head, cosine, cosine + p.R / 2, p.R / 2);
  }
  int64_t width = p.H * p.D, slot = p.slots[t];
  KV* key = cache + slot / p.block_size * p.block_stride + slot % p.block_size * width;
  copy_head(row + p.Q * p.D, key, width);
  copy_head(row + (p.Q + p.H) * p.D, key + p.block_size * width, width);
}

template <typename KV>
void rope_and_cache(const Rope& p, KV* cache, int threads) {
  each_row(p.T, (p.Q + 2 * p.H) * p.D, threads, [&](int64_t t) { rope_token(p, cache, t); });
}

}  // namespace

extern "C" {

void xllm_rms_norm(const float* x, const float* weight, float eps, float* y, int64_t M, int64_t K, int threads) {
  each_row(M, K, threads, [=](int64_t m) {
    scale_row(x + m * K, weight, 1.f / std::sqrt(mean_square(x + m * K, K) + eps), y + m * K, K);
  });
}

void xllm_add_rms_norm(const float* x, float* residual, const float* weight, float eps, float* y, int64_t M, int64_t K, int threads) {
  each_row(M, K, threads, [=](int64_t m) {
    float* row = residual + m * K;
    add_row(row, x + m * K, K);
    scale_row(row, weight, 1.f / std::sqrt(mean_square(row, K) + eps), y + m * K, K);
  });
}

void xllm_silu_and_mul(const float* gate_up, float* y, int64_t M, int64_t I, int threads) {
  each_row(M, I, threads, [=](int64_t m) { silu_row(gate_up + 2 * m * I, gate_up + (2 * m + 1) * I, y + m * I, I); });
}

#define ROPE_AND_CACHE(name, KV)                                                                                      \
  void name(float* qkv, const int64_t* positions, const float* cos_sin, const float* q_norm, const float* k_norm,     \
            float eps, KV* cache, const int64_t* slots, int64_t T, int64_t Q, int64_t H, int64_t D, int64_t R,        \
            int64_t block_stride, int64_t block_size, int threads) {                                                  \
    rope_and_cache<KV>(                                                                                               \
        {qkv, positions, cos_sin, q_norm, k_norm, eps, slots, T, Q, H, D, R, block_stride, block_size}, cache, threads); \
  }
ROPE_AND_CACHE(xllm_rope_and_cache_float32, float)
ROPE_AND_CACHE(xllm_rope_and_cache_bfloat16, bf16)
}
