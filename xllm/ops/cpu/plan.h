// How a step of attention is cut into items that threads take one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile.h"

constexpr int64_t SPLIT = 256;      // a multiple of TILE
constexpr int64_t ROWS = 32;        // rows of an item, unless one token's rows of one KV head are more
constexpr int64_t FEW = 4;          // rows of a KV head that are computed together
constexpr int64_t PER_THREAD = 2;   // items that keep threads equally busy
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

  // Whether rows of one KV head are computed from the cache as it is. More rows read it several times: they widen it first.
  bool direct(int64_t rows) const { return rows <= FEW && D % PIECE == 0; }
};

// Rows of the KV heads `head` .. `head + heads`: tokens `first` .. `first + tokens` of sequence s, over the splits
// `from` .. `to`.
struct Item {
  int32_t s, head, heads, first, tokens;
  int32_t from, to;
  int32_t join;  // which Join its result goes to; -1: it is the whole result
};

// Splits computed apart; the thread that brings the last one merges them all.
struct Join {
  int32_t left, first, splits;
  int64_t state;  // where in the shared memory its states begin
};

// Few rows over a long context are cut by splits. Their arithmetic is little, so they go through all KV heads, as memory
// lies, unless threads would then be idle. Of many rows the long ones of a sequence come first.
template <typename KV>
struct Plan {
  const Call<KV>& c;
  int threads;
  std::vector<Item> items;
  std::vector<Join> joins;
  int64_t G, shared = 0;

  Plan(const Call<KV>& c, int threads) : c(c), threads(threads), G(c.Q / c.H) {
    int64_t block = std::max<int64_t>(1, ROWS / G), work = 0, few = 0;
    for (int64_t s = 0; s < c.S; s++) {
      work += tokens(s) * c.contexts[s] * c.Q * c.D;
      if (c.direct(tokens(s) * G)) few += (c.contexts[s] + SPLIT - 1) / SPLIT;
    }
    if (work < SMALL) this->threads = 1;
    for (int32_t s = 0; s < c.S; s++) {
      int64_t start = c.contexts[s] - tokens(s);
      for (int64_t first = (tokens(s) - 1) / block * block; first >= 0; first -= block) {
        int64_t count = std::min(block, tokens(s) - first);
        int64_t from = c.window ? std::max<int64_t>(0, start + first - c.window + 1) / SPLIT : 0;
        int64_t to = (start + first + count - 1) / SPLIT + 1;
        int64_t heads = c.direct(count * G) ? heads_at_once(count * G, few) : 1;
        bool apart = tokens(s) <= block && to - from > 1;
        for (int64_t head = 0; head < c.H; head += heads)
          add({s, (int32_t)head, (int32_t)std::min(heads, c.H - head), (int32_t)first, (int32_t)count, (int32_t)from,
               (int32_t)to, -1},
              apart);
      }
    }
  }

  int64_t tokens(int64_t s) const { return c.starts[s + 1] - c.starts[s]; }

  int64_t heads_at_once(int64_t rows, int64_t pieces) const {
    int64_t heads = std::min(c.H, ROWS / rows);
    while (heads > 1 && (c.H + heads - 1) / heads * pieces < PER_THREAD * threads) heads = (heads + 1) / 2;
    return heads;
  }

  void add(Item item, bool apart) {
    if (!apart) return items.push_back(item);
    int32_t splits = item.to - item.from;
    item.join = (int32_t)joins.size();
    joins.push_back({splits, item.from, splits, shared});
    shared += splits * item.heads * item.tokens * G * (c.DP + 2);
    for (int32_t from = item.from; from < item.to; from++) {
      Item one = item;
      one.from = from, one.to = from + 1;
      items.push_back(one);
    }
  }
};
