// Attention over paged KV, prefill and decode, without gathering pages.
//
// Positions are cut into tiles of TILE and splits of SPLIT tokens, counted from the start of the sequence. A query
// goes through the tiles of a split with the running softmax of flash attention (Dao et al. 2022) and its splits are
// merged in order (flash decoding). Both happen alike whether the query stands alone in a decode step, where threads
// share the splits, or in a block of a prefill chunk, where one thread runs through all of them; what a query may not
// see counts as an exact zero. So a query's result is bitwise independent of the batch, the chunking and the threads.
//
// Legend: a row is one query head of one token; the rows that share a KV head are computed together. Q query heads,
// H KV heads, G = Q / H, D head size, padded to DP, a multiple of the vector length.
#include <algorithm>
#include <memory>
#include <vector>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int64_t SPLIT = 256;  // a multiple of TILE
constexpr int64_t ROWS = 32;    // rows of a query block, unless one token alone has more
constexpr int64_t SMALL = 1 << 15;  // multiplications that are not worth waking a second thread

template <typename KV>
struct Call {
  const float* q;
  int64_t q_stride;  // numbers between tokens
  const KV* cache;   // at the layer, in block 0
  int64_t block_stride, block_size;
  const int32_t *starts, *contexts, *table;
  int64_t S, table_width;
  float scale;
  int64_t window;  // 0: none
  int64_t Q, H, D, DP;
  float* out;  // [T, Q, D]
};

// Rows of one KV head: tokens `first` .. `first + tokens` of sequence s, over the splits `from` .. `to`.
struct Item {
  int32_t s, head, first, tokens;
  int32_t from, to;
  int32_t join;  // which Join its result goes to; -1: it is the whole result
};

// Splits computed apart; the thread that brings the last one merges them all.
struct Join {
  int32_t left, first, splits;
  int64_t state;  // where in the shared memory its states begin
};

struct Scratch {
  std::vector<float> memory;
  std::vector<Row> part_rows, whole_rows;
  float *q, *k, *v, *scores, *part, *whole;
  void fit(int64_t dp, int64_t rows) {
    part_rows.resize(rows), whole_rows.resize(rows);
    memory.resize(dp * (3 * rows + 2 * TILE) + rows * TILE + 16);
    float* at = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    q = at, at += rows * dp;
    k = at, at += TILE * dp;
    v = at, at += TILE * dp;
    part = at, at += rows * dp;
    whole = at, at += rows * dp;
    scores = at;
  }
};

template <typename KV>
struct Block {
  const Call<KV>& c;
  const Item& item;
  Scratch& scratch;
  int64_t G, context, position;  // position of the first token
  int rows;

  Block(const Call<KV>& c, const Item& item, Scratch& scratch) : c(c), item(item), scratch(scratch) {
    G = c.Q / c.H;
    context = c.contexts[item.s];
    position = context - (c.starts[item.s + 1] - c.starts[item.s]) + item.first;
    rows = (int)(item.tokens * G);
  }

  // Where row r's query head lies in a [T, Q] arrangement of heads.
  int64_t token(int r) const { return c.starts[item.s] + item.first + r / G; }
  int64_t head(int r) const { return item.head * G + r % G; }

  void load_queries() {
    for (int r = 0; r < rows; r++) {
      const float* from = c.q + token(r) * c.q_stride + head(r) * c.D;
      float* to = scratch.q + r * c.DP;
      for (int64_t d = 0; d < c.D; d++) to[d] = from[d] * c.scale;
      std::fill(to + c.D, to + c.DP, 0.f);
    }
  }

  // Keys and values of the positions t .. t + TILE, widened; zeros past the context. What comes after them is asked
  // for ahead: heads of successive tokens lie too far apart for the processor to guess.
  void load_tile(int64_t t) {
    int64_t valid = std::min<int64_t>(TILE, context - t), ahead = std::min<int64_t>(TILE, context - t - TILE);
    int64_t dp = c.DP, values = c.block_size * c.H * c.D;
    float *k = scratch.k, *v = scratch.v;
    each_run(t, valid, [=, d = c.D, stride = c.H * c.D](const KV* key, int64_t tokens) mutable {
      for (; tokens; tokens--, key += stride, k += dp, v += dp) {
        widen_row(key, k, d, dp);
        widen_row(key + values, v, d, dp);
      }
    });
    std::fill(scratch.k + valid * dp, scratch.k + TILE * dp, 0.f);
    std::fill(scratch.v + valid * dp, scratch.v + TILE * dp, 0.f);
    if (ahead > 0)
      each_run(t + TILE, ahead, [=, bytes = c.D * (int64_t)sizeof(KV), stride = c.H * c.D](const KV* key, int64_t tokens) {
        for (; tokens; tokens--, key += stride)
          for (int64_t line = 0; line < bytes; line += 64) {
            __builtin_prefetch((const char*)key + line);
            __builtin_prefetch((const char*)(key + values) + line);
          }
      });
  }

  // f(first key, tokens) for each run of the positions t .. t + count that lies within one block.
  template <typename F>
  void each_run(int64_t t, int64_t count, F&& f) {
    const int32_t* table = c.table + item.s * c.table_width;
    while (count > 0) {
      int64_t offset = t % c.block_size, tokens = std::min(count, c.block_size - offset);
      f(c.cache + table[t / c.block_size] * c.block_stride + (offset * c.H + item.head) * c.D, tokens);
      t += tokens, count -= tokens;
    }
  }

  static void widen_row(const KV* from, float* to, int64_t size, int64_t padded) {
    int64_t d = 0;
    for (; d + 4 * VL <= size; d += 4 * VL) {
      vf a = load(from + d), b = load(from + d + VL), e = load(from + d + 2 * VL), f = load(from + d + 3 * VL);
      store(to + d, a), store(to + d + VL, b), store(to + d + 2 * VL, e), store(to + d + 3 * VL, f);
    }
    for (; d + VL <= size; d += VL) store(to + d, load(from + d));
    for (; d < size; d++) to[d] = widen(from[d]);
    for (; d < padded; d++) to[d] = 0.f;
  }

  // First position that row r sees, and one past its last.
  int64_t begin(int64_t token) const { return c.window ? std::max<int64_t>(0, position + token - c.window + 1) : 0; }
  int64_t end(int64_t token) const { return position + token + 1; }

  void run_split(int64_t split, Row* state) {
    for (int r = 0; r < rows; r++) {
      state[r].high = NEVER, state[r].total = 0.f;
      std::fill(state[r].values, state[r].values + c.DP, 0.f);
    }
    int64_t from = std::max(split * SPLIT, begin(0) / TILE * TILE);
    int64_t to = std::min((split + 1) * SPLIT, end(item.tokens - 1));
    int64_t dp = c.DP;
    Scratch& m = scratch;
    float* values = state[0].values;
    for (int64_t t = from; t < to; t += TILE) {
      load_tile(t);
      in_fours(
          rows, [&](int r) { tile_dots<4>(m.q + r * dp, m.k, dp, m.scores + r * TILE); },
          [&](int r) { tile_dots<2>(m.q + r * dp, m.k, dp, m.scores + r * TILE); },
          [&](int r) { tile_dots<1>(m.q + r * dp, m.k, dp, m.scores + r * TILE); });
      for (int r = 0; r < rows; r++) {
        int64_t first = std::clamp<int64_t>(begin(r / G) - t, 0, TILE), last = std::clamp<int64_t>(end(r / G) - t, 0, TILE);
        soften(state[r], m.scores + r * TILE, (int)first, (int)last, dp);
      }
      in_fours(
          rows, [&](int r) { tile_weigh<4>(m.scores + r * TILE, m.v, dp, values + r * dp); },
          [&](int r) { tile_weigh<2>(m.scores + r * TILE, m.v, dp, values + r * dp); },
          [&](int r) { tile_weigh<1>(m.scores + r * TILE, m.v, dp, values + r * dp); });
    }
  }

  void finish(int r, const Row& row) {
    float* to = c.out + (token(r) * c.Q + head(r)) * c.D;
    for (int64_t d = 0; d < c.D; d++) to[d] = row.values[d] / row.total;
  }
};

void place(Row* rows, int count, float* values, int64_t dp) {
  for (int r = 0; r < count; r++) rows[r] = {NEVER, 0.f, values + r * dp};
}

// A query block over all its splits.
template <typename KV>
void run_whole(Block<KV>& block, Scratch& scratch, int64_t dp) {
  Row *whole = scratch.whole_rows.data(), *part = scratch.part_rows.data();
  place(whole, block.rows, scratch.whole, dp);
  place(part, block.rows, scratch.part, dp);
  std::fill(scratch.whole, scratch.whole + block.rows * dp, 0.f);
  for (int64_t split = block.item.from; split < block.item.to; split++) {
    block.run_split(split, part);
    for (int r = 0; r < block.rows; r++) merge(whole[r], part[r], dp);
  }
  for (int r = 0; r < block.rows; r++) block.finish(r, whole[r]);
}

// One split of a query block; its state goes to shared memory: per row the values, then high and total.
template <typename KV>
void run_shared(Block<KV>& block, Scratch& scratch, int64_t dp, Join& join, float* shared) {
  Row* part = scratch.part_rows.data();
  int64_t size = block.rows * (dp + 2);
  float* mine = shared + join.state + (block.item.from - join.first) * size;
  place(part, block.rows, mine, dp);
  block.run_split(block.item.from, part);
  for (int r = 0; r < block.rows; r++) {
    mine[block.rows * dp + 2 * r] = part[r].high;
    mine[block.rows * dp + 2 * r + 1] = part[r].total;
  }
  if (__atomic_sub_fetch(&join.left, 1, __ATOMIC_ACQ_REL)) return;
  for (int r = 0; r < block.rows; r++) {
    Row whole = {NEVER, 0.f, scratch.whole};
    std::fill(scratch.whole, scratch.whole + dp, 0.f);
    for (int64_t i = 0; i < join.splits; i++) {
      float* state = shared + join.state + i * size;
      float* sums = state + block.rows * dp + 2 * r;
      merge(whole, {sums[0], sums[1], state + r * dp}, dp);
    }
    block.finish(r, whole);
  }
}

// Cuts the step into items, the long ones of a sequence first. Few rows over a long context are cut by splits.
template <typename KV>
struct Plan {
  std::vector<Item> items;
  std::vector<Join> joins;
  int64_t shared = 0, work = 0;

  explicit Plan(const Call<KV>& c) {
    int64_t G = c.Q / c.H, block = std::max<int64_t>(1, ROWS / G);
    for (int32_t s = 0; s < c.S; s++) {
      int64_t tokens = c.starts[s + 1] - c.starts[s], start = c.contexts[s] - tokens;
      work += tokens * c.contexts[s] * c.Q * c.D;
      for (int64_t first = (tokens - 1) / block * block; first >= 0; first -= block) {
        int64_t count = std::min(block, tokens - first);
        int64_t from = c.window ? std::max<int64_t>(0, start + first - c.window + 1) / SPLIT : 0;
        int64_t to = (start + first + count - 1) / SPLIT + 1;
        bool apart = tokens <= block && to - from > 1;
        for (int32_t head = 0; head < c.H; head++) add(c, {s, head, (int32_t)first, (int32_t)count, (int32_t)from, (int32_t)to, -1}, apart);
      }
    }
  }

  void add(const Call<KV>& c, Item item, bool apart) {
    if (!apart) return items.push_back(item);
    int32_t splits = item.to - item.from;
    item.join = (int32_t)joins.size();
    joins.push_back({splits, item.from, splits, shared});
    shared += splits * item.tokens * (c.Q / c.H) * (c.DP + 2);
    for (int32_t from = item.from; from < item.to; from++) {
      Item one = item;
      one.from = from, one.to = from + 1;
      items.push_back(one);
    }
  }
};

template <typename KV>
void attend(Call<KV> c, int threads) {
  c.DP = (c.D + VL - 1) / VL * VL;
  Plan<KV> plan(c);
  std::unique_ptr<float[]> shared(new float[plan.shared]);
  if (plan.work < SMALL) threads = 1;
  each((int64_t)plan.items.size(), threads, [&](int64_t i) {
    static thread_local Scratch scratch;
    scratch.fit(c.DP, std::max(ROWS, c.Q / c.H));
    Block<KV> block(c, plan.items[i], scratch);
    block.load_queries();
    if (block.item.join < 0)
      run_whole(block, scratch, c.DP);
    else
      run_shared(block, scratch, c.DP, plan.joins[block.item.join], shared.get());
  });
}

}  // namespace

extern "C" {

#define ATTENTION(name, KV)                                                                                           \
  void name(const float* q, int64_t q_stride, const KV* cache, int64_t block_stride, int64_t block_size,              \
            const int32_t* starts, const int32_t* contexts, const int32_t* table, int64_t S, int64_t table_width,     \
            float scale, int64_t window, int64_t Q, int64_t H, int64_t D, float* out, int threads) {                  \
    attend<KV>({q, q_stride, cache, block_stride, block_size, starts, contexts, table, S, table_width, scale, window, \
                Q, H, D, 0, out},                                                                                     \
               threads);                                                                                              \
  }
ATTENTION(xllm_attention_float32, float)
ATTENTION(xllm_attention_bfloat16, bf16)
}
