// Packing weights into panels, and reading single rows back (embeddings, also where they are tied to the output).
#include "panel.h"

#include <algorithm>

#include "pool.h"

namespace {

// Put `rows` rows of source [rows, K] at row `first` of a packed weight. T is a number, STEP of them make a word.
template <typename T, int STEP>
void pack(T* packed, const T* source, int64_t first, int64_t rows, int64_t K, int threads) {
  int64_t panel_size = (K + STEP - 1) / STEP * STEP * NR;
  int64_t first_panel = first / NR, last_panel = (first + rows - 1) / NR;
  each(last_panel - first_panel + 1, threads, [=](int64_t i) {
    int64_t block = first_panel + i;
    int64_t from = std::max(first, block * NR), to = std::min(first + rows, (block + 1) * NR);
    for (int64_t k0 = 0; k0 < K; k0 += 32)
      for (int64_t n = from; n < to; n++)
        for (int64_t k = k0; k < std::min(K, k0 + 32); k++)
          packed[block * panel_size + (k / STEP * NR + n % NR) * STEP + k % STEP] = source[(n - first) * K + k];
  });
}

template <typename T, int STEP>
void lookup(const int64_t* ids, const T* packed, float* out, int64_t M, int64_t K, int threads) {
  int64_t panel_size = (K + STEP - 1) / STEP * STEP * NR;
  each_row(M, K, threads, [=](int64_t m) {
    const T* row = packed + ids[m] / NR * panel_size + ids[m] % NR * STEP;
    for (int64_t k = 0; k < K; k++) out[m * K + k] = widen(row[k / STEP * NR * STEP + k % STEP]);
  });
}

}  // namespace

extern "C" {

int64_t xllm_panel_rows() { return NR; }

void xllm_pack_float32(float* packed, const float* source, int64_t first, int64_t rows, int64_t K, int threads) {
  pack<float, 1>(packed, source, first, rows, K, threads);
}
void xllm_pack_bfloat16(bf16* packed, const bf16* source, int64_t first, int64_t rows, int64_t K, int threads) {
  pack<bf16, 2>(packed, source, first, rows, K, threads);
}

void xllm_embedding_float32(const int64_t* ids, const float* packed, float* out, int64_t M, int64_t K, int threads) {
  lookup<float, 1>(ids, packed, out, M, K, threads);
}
void xllm_embedding_bfloat16(const int64_t* ids, const bf16* packed, float* out, int64_t M, int64_t K, int threads) {
  lookup<bf16, 2>(ids, packed, out, M, K, threads);
}
}
