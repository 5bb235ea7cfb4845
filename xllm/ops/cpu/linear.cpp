// Matrix products with packed weights.
//
// Weights lie in panels of NR rows (`panel.h`). The kernel holds MR tokens x NR outputs in registers, reads the panel's
// numbers for one k and multiplies them with one number of each token. So weights cross memory once per step as they
// are stored, and every output is one chain of multiply-adds over k = 0, 1, ..., K - 1 whatever the number of tokens,
// the tiling and the threads: results are bitwise independent of the batch.
//
// bfloat16 can be multiplied in two ways: `Wide` widens both halves of a word (a shift, a mask) and computes in float32;
// `Dot` rounds the tokens to bfloat16 and uses the processor's dot product of pairs. Which is faster differs by a factor
// of two either way between processors, so the caller measures once (`xllm_linear_gflops`) and stays with it.
#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "panel.h"
#include "pool.h"
#include "vec.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 6;  // 24 of 32 registers accumulate
#else
constexpr int MR = 3;  // 12 of 16
#endif
constexpr int64_t KC = 256;   // k of a tile before the next: that piece of a panel stays in the first-level cache
constexpr int64_t KC_FEW = 128;  // with few tokens: that piece and the next, which memory brings meanwhile, stay there
constexpr int64_t MC = 240;   // tokens whose KC numbers stay in the second-level cache; a multiple of MR
constexpr int64_t GROUP = 4;  // panels a thread takes at a time
constexpr int64_t AHEAD = 2048;  // bytes of weight fetched ahead where each is used by one tile only
constexpr int64_t FEW = 64;      // tokens up to which weights, not tokens, are what memory is read for
constexpr int LINES = NR * 4 / 64;  // cache lines of a panel for one step of k
constexpr int64_t SMALL = 1 << 17;  // multiplications that are not worth waking a second thread

// A way to multiply: W is what a weight is made of, X what a token is made of; STEP k's go at once.
struct Float32 {
  typedef float W;
  typedef float X;
  static constexpr int STEP = 1;
  template <int M>
  static inline void multiply(const X* x, int64_t ldx, const W* w, vf acc[M][4]) {
    vf a[4];
    for (int j = 0; j < 4; j++) a[j] = hold(load(w + j * VL));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vf b = splat(x[m * ldx]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[m][j] += b * a[j];
    }
  }
};

struct Wide {
  typedef uint32_t W;
  typedef float X;
  static constexpr int STEP = 2;
  template <int M>
  static inline void multiply(const X* x, int64_t ldx, const W* w, vf acc[M][4]) {
    vu pairs[4];
    for (int j = 0; j < 4; j++) pairs[j] = *(const vu_any*)(w + j * VL);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      vf a[4];
      for (int j = 0; j < 4; j++) a[j] = (vf)(half ? pairs[j] & 0xffff0000u : pairs[j] << 16);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        vf b = splat(x[m * ldx + half]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] += b * a[j];
      }
    }
  }
};

#if defined(__AVX512BF16__)
struct Dot {
  typedef uint32_t W;
  typedef bf16 X;
  static constexpr int STEP = 2;
  template <int M>
  static inline void multiply(const X* x, int64_t ldx, const W* w, vf acc[M][4]) {
    __m512bh a[4];
    for (int j = 0; j < 4; j++) a[j] = (__m512bh)hold(_mm512_loadu_si512(w + j * VL));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      uint32_t pair;
      memcpy(&pair, x + m * ldx, 4);
      __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[m][j] = (vf)_mm512_dpbf16_ps((__m512)acc[m][j], a[j], b);
    }
  }
};
#endif

// What a tile asks memory for while it computes: lines `from` .. `to` of each step, `bytes` further on. The tiles that
// use the same numbers one after the other share the next numbers' lines, so that memory never rests.
struct Fetch {
  int64_t bytes;
  int from, to;
};

// y[M, NR] += x[M, depth] * panel[depth, NR]
template <typename Way, int M>
void tile(const typename Way::X* x, int64_t ldx, const typename Way::W* panel, int64_t depth, float* y, int64_t ldy, Fetch fetch) {
  vf acc[M][4];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[m][j] = load(y + m * ldy + j * VL);
  for (int64_t k = 0; k < depth; k += Way::STEP) {
    for (int line = fetch.from; line < fetch.to; line++) __builtin_prefetch((const char*)panel + fetch.bytes + line * 64);
    Way::template multiply<M>(x + k, ldx, panel, acc);
    panel += NR;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) store(y + m * ldy + j * VL, acc[m][j]);
}

template <typename Way>
void tile_of(int64_t rows, const typename Way::X* x, int64_t ldx, const typename Way::W* panel, int64_t depth, float* y, int64_t ldy, Fetch fetch) {
  switch (rows) {
    case 1: return tile<Way, 1>(x, ldx, panel, depth, y, ldy, fetch);
    case 2: return tile<Way, 2>(x, ldx, panel, depth, y, ldy, fetch);
    case 3: return tile<Way, 3>(x, ldx, panel, depth, y, ldy, fetch);
    case 4: return tile<Way, std::min(4, MR)>(x, ldx, panel, depth, y, ldy, fetch);
    case 5: return tile<Way, std::min(5, MR)>(x, ldx, panel, depth, y, ldy, fetch);
    case 6: return tile<Way, std::min(6, MR)>(x, ldx, panel, depth, y, ldy, fetch);
  }
}

struct Product {
  const float* bias;  // [N] or null
  float* y;           // [M, N]
  int64_t M, N, K;    // K of x and of the panels: padded to even for bfloat16
};

// Tokens m0 .. m1 of one panel over `depth` numbers from k0 on. The last panel may have fewer than NR columns; it is
// computed in a spare tile.
template <typename Way>
void stripe(const Product& p, const typename Way::X* x, const typename Way::W* weight, int64_t panel, int64_t m0, int64_t m1, int64_t k0, int64_t depth) {
  const typename Way::W* numbers = weight + (panel * p.K + k0) / Way::STEP * NR;
  int64_t n = panel * NR, columns = std::min<int64_t>(NR, p.N - n);
  int64_t pieces = (m1 - m0 + MR - 1) / MR;
  if (pieces == 3) pieces = 4;  // equal shares of what is fetched
  float spare[MR * NR] = {};
  for (int64_t piece = 0; piece < pieces; piece++) {
    int64_t first = m0 + (m1 - m0) * piece / pieces, rows = m0 + (m1 - m0) * (piece + 1) / pieces - first;
    float* out = p.y + first * p.N + n;
    int64_t sharing = std::min<int64_t>(pieces, LINES);
    Fetch fetch = {pieces == 1 ? AHEAD : depth / Way::STEP * NR * 4, 0, 0};
    if (piece < sharing) fetch.from = (int)(LINES * piece / sharing), fetch.to = (int)(LINES * (piece + 1) / sharing);
    if (k0 == 0)
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[i * p.N + j] = p.bias ? p.bias[n + j] : 0.f;
    if (columns == NR) {
      tile_of<Way>(rows, x + first * p.K + k0, p.K, numbers, depth, out, p.N, fetch);
    } else {
      for (int64_t i = 0; i < rows; i++) std::copy_n(out + i * p.N, columns, spare + i * NR);
      tile_of<Way>(rows, x + first * p.K + k0, p.K, numbers, depth, spare, NR, fetch);
      for (int64_t i = 0; i < rows; i++) std::copy_n(spare + i * NR, columns, out + i * p.N);
    }
  }
}

template <typename Way>
void multiply(const Product& p, const typename Way::X* x, const typename Way::W* weight, int threads) {
  int64_t count = (p.N + NR - 1) / NR;
  int64_t group = std::max<int64_t>(1, std::min(GROUP, count / (4 * threads)));
  int64_t depth_step = p.M <= MR ? p.K : p.M <= FEW ? KC_FEW : KC;
  int64_t panels_at_once = p.M <= FEW ? 1 : group;  // few tokens: read each panel through; many: use their numbers again
  if (p.M * p.N * p.K < SMALL) threads = 1;
  each((count + group - 1) / group, threads, [&](int64_t g) {
    int64_t end = std::min(count, (g + 1) * group);
    for (int64_t first = g * group; first < end; first += panels_at_once)
      for (int64_t m = 0; m < p.M; m += MC)
        for (int64_t k = 0; k < p.K; k += depth_step)
          for (int64_t panel = first; panel < std::min(end, first + panels_at_once); panel++)
            stripe<Way>(p, x, weight, panel, m, std::min(p.M, m + MC), k, std::min(depth_step, p.K - k));
  });
}

#if defined(__AVX512BF16__)
// Rows of x as bfloat16, padded to an even length with zero.
void round_rows(const float* x, bf16* out, int64_t M, int64_t K, int64_t padded, int threads) {
  each_row(M, K, threads, [=](int64_t m) {
    int64_t k = 0;
    for (; k + VL <= K; k += VL) store(out + m * padded + k, load(x + m * K + k));
    for (; k < K; k++) narrow(out + m * padded + k, x[m * K + k]);
    if (padded > K) out[m * padded + K] = 0;
  });
}
#endif

// Best of a few runs of the full tile over numbers in the first-level cache, in GFLOP/s of one thread.
template <typename Way>
double gflops() {
  auto x = std::make_unique<typename Way::X[]>(MR * KC);
  auto panel = std::make_unique<typename Way::W[]>(KC * NR);
  float y[MR * NR] = {};
  double best = 1e9;
  for (int run = 0; run < 20; run++) {
    auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 8; i++) {
      tile<Way, MR>(x.get(), KC, panel.get(), KC, y, NR, {0, 0, 0});
      asm volatile("" : : "r"(x.get()), "r"(panel.get()), "r"(y) : "memory");  // nothing is known about them
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return 8 * 2.0 * MR * NR * KC / best / 1e9;
}

}  // namespace

extern "C" {

// GFLOP/s of one thread: way 0 Float32, 1 Wide, 2 Dot (0 where the processor has no such instruction).
double xllm_linear_gflops(int way) {
  if (way == 0) return gflops<Float32>();
  if (way == 1) return gflops<Wide>();
#if defined(__AVX512BF16__)
  return gflops<Dot>();
#else
  return 0;
#endif
}

// x [M, K] float32, y [M, N] float32.
void xllm_linear_float32(const float* x, const float* weight, const float* bias, float* y, int64_t M, int64_t N, int64_t K, int threads) {
  multiply<Float32>({bias, y, M, N, K}, x, weight, threads);
}

void xllm_linear_bfloat16(const float* x, const uint32_t* weight, const float* bias, float* y, int64_t M, int64_t N, int64_t K, int dot, int threads) {
  static thread_local std::vector<float> scratch;  // x as the kernel wants it, where that differs
  int64_t padded = K + K % 2;
  if (dot || padded > K) scratch.resize(std::max<size_t>(scratch.size(), M * padded));
  Product product = {bias, y, M, N, padded};
#if defined(__AVX512BF16__)
  if (dot) {
    bf16* rounded = (bf16*)scratch.data();
    round_rows(x, rounded, M, K, padded, threads);
    return multiply<Dot>(product, rounded, weight, threads);
  }
#endif
  (void)dot;
  if (K % 2) {
    float* even = scratch.data();
    for (int64_t m = 0; m < M; m++) {
      std::copy_n(x + m * K, K, even + m * padded);
      even[m * padded + K] = 0.f;
    }
    x = even;
  }
  multiply<Wide>(product, x, weight, threads);
}
}
