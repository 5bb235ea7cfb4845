// Vectors of the machine's natural width in GCC's portable vector extension: AVX-512, AVX2 and NEON from one source.
//
// Every reduction here has one fixed order, so a row's result does not depend on what is computed beside it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));  // loads from any address
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

typedef uint16_t bf16;  // the upper half of a float's bits

// The number of each lane. Written out, since compilers do not fold a loop that fills it.
#if defined(__AVX512F__)
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX__)
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi LANE = {0, 1, 2, 3};
#endif

static inline vf splat(float x) { return x - vf{}; }  // minus: x + 0 is not x for -0, and would be computed

// Keeps x in a register where the compiler would rather load it again at every use: that costs the loads' port.
template <typename V>
static inline V hold(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline vf load(const bf16* p) {
  vu wide = __builtin_convertvector((vh)*(const vh_any*)p, vu) << 16;
  return (vf)wide;
}

// Round to nearest even, as PyTorch does; a NaN stays one.
static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline void store(bf16* p, vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu nan = (vu)(x != x);
  *(vh_any*)p = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
}

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
static inline void narrow(float* p, float x) { *p = x; }
static inline void narrow(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *p = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

// x with each lane replaced by the one DISTANCE (a power of two) away in the other half of its group.
template <int DISTANCE>
static inline vf across(vf x) {
  return __builtin_shuffle(x, LANE ^ DISTANCE);
}

// Sum, and largest, of all lanes, folding halves upon each other.
template <int HALF = VL / 2>
static inline float sum(vf x) {
  if constexpr (HALF == 0) return x[0];
  else return sum<HALF / 2>(x + across<HALF>(x));
}
template <int HALF = VL / 2>
static inline float largest(vf x) {
  if constexpr (HALF == 0) return x[0];
  else return largest<HALF / 2>(larger(x, across<HALF>(x)));
}

// e^x to about 2 units in the last place for x <= 88; what is below -87 counts as -87. Cephes' polynomial (Moshier) on the remainder of x / ln 2.
static inline vf exp(vf x) {
  x = larger(x, splat(-87.f));
  vf shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  vf n = shifted - 12582912.f;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  vi power = ((vi)shifted << 23);
  return (vf)((vi)p + power);
}
