// How a weight [N, K] is kept: in panels of NR rows, so that for one k a panel's numbers lie together.
//
//   float32:  [N / NR, K, NR] numbers.
//   bfloat16: [N / NR, K / 2, NR] words; a word holds k in its low half and k + 1 in its high half (K padded to even).
#pragma once

#include "vec.h"

constexpr int NR = 4 * VL;
