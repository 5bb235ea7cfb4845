// Attention over paged KV, prefill and decode, without gathering pages.
//
// Positions are cut into tiles of TILE and splits of SPLIT tokens, counted from the start of the sequence. A query
// goes through the tiles of a split with the running softmax of flash attention (Dao et al. 2022) and its splits are
// merged in order (flash decoding). Both happen alike whether the query stands alone in a decode step, where threads
// share the splits, or in a block of a prefill chunk, where one thread runs through all of them; what a query may not
// see counts as an exact zero. So a query's result is bitwise independent of the batch, the chunking and the threads.
//
// Legend: a row is one query head of one token; the rows that share a KV head are computed together. Q query heads,
// H KV heads, G = Q / H, D head size, padded to DP, a multiple of PIECE.
#include <vector>

#include "plan.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int ASKS = 8;  // parts in which a KV head's share of the next tile is asked for

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

// Where the keys and values of a tile's tokens lie. Those past the last repeat it.
template <typename E>
struct Places {
  const E *keys[TILE], *values[TILE];
};

// What comes next is asked for bit by bit while the present is computed, so that memory never rests: heads of successive
// tokens lie too far apart for the processor to guess. In the order of memory, one head of one token at a time.
template <typename KV>
struct Ahead {
  Places<KV> places;
  int heads, tokens, row, head, at_once;
  int64_t size;  // of a head

  void begin(int count, int parts) {
    tokens = count, row = head = 0;
    at_once = (2 * tokens * heads + parts - 1) / parts;
  }

  void ask() {
    for (int i = 0; i < at_once && row < 2 * tokens; i++) {
      const KV* from = (row < tokens ? places.keys[row] : places.values[row - tokens]) + head * size;
      for (int64_t d = 0; d < size; d += 64 / sizeof(KV)) __builtin_prefetch(from + d);
      if (++head == heads) head = 0, row++;
    }
  }
};

template <typename KV>
struct Block {
  const Call<KV>& c;
  const Item& item;
  Scratch& scratch;
  int64_t G, context, position;  // position of the first token
  int rows, all;                 // of one KV head, of all of them

  Block(const Call<KV>& c, const Item& item, Scratch& scratch) : c(c), item(item), scratch(scratch) {
    G = c.Q / c.H;
    context = c.contexts[item.s];
    position = context - (c.starts[item.s + 1] - c.starts[item.s]) + item.first;
    rows = (int)(item.tokens * G);
    all = rows * item.heads;
  }

  // Where row r's query head lies in a [T, Q] arrangement of heads.
  int64_t token(int r) const { return c.starts[item.s] + item.first + r % rows / G; }
  int64_t head(int r) const { return (item.head + r / rows) * G + r % G; }

  void load_queries() {
    for (int r = 0; r < all; r++) {
      const float* from = c.q + token(r) * c.q_stride + head(r) * c.D;
      float* to = scratch.q + r * c.DP;
      in_pieces(from, c.D, to, [&](const float* piece, float* arranged) { arrange<KV>(piece, arranged); });
      for (int64_t d = 0; d < c.DP; d += VL) store(to + d, load(to + d) * c.scale);
    }
  }

  // f(piece of `from`, place in `to`) over `size` numbers, filled up with zeros.
  template <typename T, typename F>
  static void in_pieces(const T* from, int64_t size, float* to, F&& f) {
    int64_t d = 0;
    for (; d + PIECE <= size; d += PIECE) f(from + d, to + d);
    if (d == size) return;
    T rest[PIECE] = {};
    std::copy(from + d, from + size, rest);
    f(rest, to + d);
  }

  // Finds the positions t .. t + TILE of the first head; says how many the context has.
  int locate(int64_t t, Places<KV>& places) const {
    int valid = (int)std::min<int64_t>(TILE, context - t), i = 0;
    int64_t values = c.block_size * c.H * c.D;
    const int32_t* table = c.table + item.s * c.table_width;
    while (i < valid) {
      int64_t offset = (t + i) % c.block_size, run = std::min<int64_t>(valid - i, c.block_size - offset);
      const KV* key = c.cache + table[(t + i) / c.block_size] * c.block_stride + (offset * c.H + item.head) * c.D;
      for (; run; run--, i++, key += c.H * c.D) places.keys[i] = key, places.values[i] = key + values;
    }
    for (; i < TILE; i++) places.keys[i] = places.keys[valid - 1], places.values[i] = places.values[valid - 1];
    return valid;
  }

  void widen_tile(const Places<KV>& from, int valid, Places<float>& to) {
    auto widened = [](const KV* piece, float* into) {
      vf x[2];
      load_piece(piece, x);
      store(into, x[0]), store(into + VL, x[1]);
    };
    for (int i = 0; i < valid; i++) {
      in_pieces(from.keys[i], c.D, scratch.k + i * c.DP, widened);
      in_pieces(from.values[i], c.D, scratch.v + i * c.DP, widened);
    }
    for (int i = 0; i < TILE; i++) {
      int at = std::min(i, valid - 1);
      to.keys[i] = scratch.k + at * c.DP, to.values[i] = scratch.v + at * c.DP;
    }
  }

  // First position that a token sees, and one past its last.
  int64_t begin(int64_t token) const { return c.window ? std::max<int64_t>(0, position + token - c.window + 1) : 0; }
  int64_t end(int64_t token) const { return position + token + 1; }

  void run_split(int64_t split, Row* state) {
    for (int r = 0; r < all; r++) {
      state[r].high = NEVER, state[r].total = 0.f;
      std::fill(state[r].values, state[r].values + c.DP, 0.f);
    }
    int64_t from = std::max(split * SPLIT, begin(0) / TILE * TILE), stop = std::min(item.to * SPLIT, end(item.tokens - 1));
    int64_t to = std::min((split + 1) * SPLIT, stop);
    Places<KV> places;
    Places<float> wide;
    Ahead<KV> ahead;
    ahead.heads = item.heads, ahead.size = c.D;
    for (int64_t t = from; t < to; t += TILE) {
      int valid = locate(t, places);
      int next = t + TILE < stop ? locate(t + TILE, ahead.places) : 0;
      ahead.begin(next, item.heads * ASKS);
      if (c.direct(rows)) {
        run_tile(t, places, valid, state, ahead);
      } else {
        widen_tile(places, valid, wide);
        run_tile(t, wide, valid, state, ahead);
      }
    }
  }

  // All rows with the tile that begins at position t: KV heads lie beside each other, and so do their rows.
  template <typename E>
  void run_tile(int64_t t, const Places<E>& places, int valid, Row* state, Ahead<KV>& ahead) {
    int64_t dp = c.DP;
    auto ask = [&] { ahead.ask(); };
    for (int h = 0; h < item.heads; h++) {
      const E* keys[TILE];
      for (int i = 0; i < TILE; i++) keys[i] = places.keys[i] + h * c.D;
      const float* q = scratch.q + h * rows * dp;
      float* scores = scratch.scores + h * rows * TILE;
      in_fours(
          rows, [&](int r) { tile_dots<4>(q + r * dp, keys, valid, dp, scores + r * TILE, ask); },
          [&](int r) { tile_dots<2>(q + r * dp, keys, valid, dp, scores + r * TILE, ask); },
          [&](int r) { tile_dots<1>(q + r * dp, keys, valid, dp, scores + r * TILE, ask); });
    }
    for (int r = 0; r < all; r++) {
      int64_t token = r % rows / G;
      int64_t first = std::clamp<int64_t>(begin(token) - t, 0, TILE), last = std::clamp<int64_t>(end(token) - t, 0, TILE);
      soften(state[r], scratch.scores + r * TILE, (int)first, (int)last, dp);
    }
    for (int h = 0; h < item.heads; h++) {
      const E* tokens[TILE];
      for (int i = 0; i < TILE; i++) tokens[i] = places.values[i] + h * c.D;
      const float* scores = scratch.scores + h * rows * TILE;
      float* values = state[h * rows].values;
      in_fours(
          rows, [&](int r) { tile_weigh<4>(scores + r * TILE, tokens, valid, dp, values + r * dp, ask); },
          [&](int r) { tile_weigh<2>(scores + r * TILE, tokens, valid, dp, values + r * dp, ask); },
          [&](int r) { tile_weigh<1>(scores + r * TILE, tokens, valid, dp, values + r * dp, ask); });
    }
  }

  void finish(int r, const Row& row) {
    float* to = c.out + (token(r) * c.Q + head(r)) * c.D;
    for (int64_t d = 0; d < c.D; d += PIECE) {
      float piece[PIECE];
      restore<KV>(row.values + d, piece);
      for (int64_t i = 0; i < std::min<int64_t>(PIECE, c.D - d); i++) to[d + i] = piece[i] / row.total;
    }
  }
};

void place(Row* rows, int count, float* values, int64_t dp) {
  for (int r = 0; r < count; r++) rows[r] = {NEVER, 0.f, values + r * dp};
}

// A query block over all its splits.
template <typename KV>
void run_whole(Block<KV>& block, Scratch& scratch, int64_t dp) {
  Row *whole = scratch.whole_rows.data(), *part = scratch.part_rows.data();
  place(whole, block.all, scratch.whole, dp);
  place(part, block.all, scratch.part, dp);
  std::fill(scratch.whole, scratch.whole + block.all * dp, 0.f);
  for (int64_t split = block.item.from; split < block.item.to; split++) {
    block.run_split(split, part);
    for (int r = 0; r < block.all; r++) merge(whole[r], part[r], dp);
  }
  for (int r = 0; r < block.all; r++) block.finish(r, whole[r]);
}

// One split of a query block; its state goes to shared memory: per row the values, then high and total.
template <typename KV>
void run_shared(Block<KV>& block, Scratch& scratch, int64_t dp, Join& join, float* shared) {
  Row* part = scratch.part_rows.data();
  int64_t size = block.all * (dp + 2);
  float* mine = shared + join.state + (block.item.from - join.first) * size;
  place(part, block.all, mine, dp);
  block.run_split(block.item.from, part);
  for (int r = 0; r < block.all; r++) {
    mine[block.all * dp + 2 * r] = part[r].high;
    mine[block.all * dp + 2 * r + 1] = part[r].total;
  }
  if (__atomic_sub_fetch(&join.left, 1, __ATOMIC_ACQ_REL)) return;
  for (int r = 0; r < block.all; r++) {
    Row whole = {NEVER, 0.f, scratch.whole};
    std::fill(scratch.whole, scratch.whole + dp, 0.f);
    for (int64_t i = 0; i < join.splits; i++) {
      float* state = shared + join.state + i * size;
      float* sums = state + block.all * dp + 2 * r;
      merge(whole, {sums[0], sums[1], state + r * dp}, dp);
    }
    block.finish(r, whole);
  }
}

template <typename KV>
void attend(Call<KV> c, int threads) {
  c.DP = (c.D + PIECE - 1) / PIECE * PIECE;
  Plan<KV> plan(c, threads);
  static thread_local std::vector<float> memory;  // kept: fresh memory would have to be cleared by the kernel
  memory.resize(std::max<size_t>(memory.size(), plan.shared));
  float* shared = memory.data();
  each((int64_t)plan.items.size(), plan.threads, [&](int64_t i) {
    static thread_local Scratch scratch;
    scratch.fit(c.DP, std::max(ROWS, plan.G));
    Block<KV> block(c, plan.items[i], scratch);
    block.load_queries();
    if (block.item.join < 0)
      run_whole(block, scratch, c.DP);
    else
      run_shared(block, scratch, c.DP, plan.joins[block.item.join], shared);
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
