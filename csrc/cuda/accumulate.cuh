// Kernels of streaming rank-one accumulation (theory in thought_kernels/ops/accumulate.py), in two pairs:
//
// 1. row_statistics and reduce_sums: row factors w/ν, sums and moments; only where a norm, a sum or the moments are
//    wanted.
// 2. product and reduce_tiles: tiles of cross and of gram's lower triangle, one grid, rows split where tiles are few.
//
// The second of each pair adds what the first left in scratch in a fixed order; there are no atomics.
#pragma once

#include "accumulate_product.cuh"
#include "accumulate_reduce.cuh"
#include "accumulate_rows.cuh"
