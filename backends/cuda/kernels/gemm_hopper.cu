// Matrix products of 16-bit elements by warp groups (architecture 9.0a), accumulated in f32: what
// gemm.cu computes, for large results. A block of two warp groups takes a tile of 128 x 128, 64 rows
// to a group; operands lie in shared memory in rows of 128 bytes, their pieces of 16 bytes swapped by
// the row's number, as the group's descriptors say.
//
// LAYOUT, OUT32 and GROUPS as in gemm.cu.
#define BM 128
#define BN 128
#define BK 64
#define THREADS 256
#define STAGES 3
// Elements of an operand's tile: two halves of 64 rows, or of 64 columns, 8 KiB each.
#define TILE 8192
#define HALF 4096
#if OUT32
typedef float C;
#else
typedef T C;
#endif

// WIDTH 64: a row of k. WIDTH 128: k down the rows, two halves beside one another.
template <int WIDTH> DEV int place_in_tile(int r, int c) {
  int half = WIDTH == 64 ? 0 : c / 64 * HALF, piece = (WIDTH == 64 ? c : c % 64) / 8;
  return half + r * 64 + ((piece ^ (r & 7)) * 8);
}

// Rows of 128 bytes swapped by eights (bits 62, 63); eight rows 1024 bytes after eight rows; a half
// 8192 bytes after the other where k runs down the rows.
DEV u64 described(u32 at) {
  return (u64)(at >> 4 & 0x3fff) | (u64)(2 * HALF / 16) << 16 | (u64)(1024 / 16) << 32 | 1ull << 62;
}
#if DT == 1
#define STEP "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
#else
#define STEP "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
#endif
DEV void group_multiply(float* c, u64 a, u64 b) {
  asm volatile(STEP "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, %66, %67;"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
               : "l"(a), "l"(b), "n"(LAYOUT == 2), "n"(LAYOUT != 0));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
gemm(const T* a, i64 a_s, const T* b, i64 b_s, C* c, i64 c_s, const T* bias, i64 m, i64 n, i64 k, i64 add,
     i64 whole_a, i64 whole_b, const int* plan, i64 b_group, i64 c_group) {
  extern __shared__ __align__(1024) u16 shared[];
  // Descriptors count from multiples of 1024 bytes; there is room to begin at one.
  u16* a_tiles = shared + (1024 - (shared_at(shared) & 1023)) % 1024 / 2;
  u16* b_tiles = a_tiles + STAGES * TILE;
  i64 row0 = (i64)blockIdx.y * BM, column0 = (i64)blockIdx.x * BN, k0 = 0;
#if GROUPS && LAYOUT == 2
  k0 = plan[blockIdx.z];
  k = plan[blockIdx.z + 1];
  c += blockIdx.z * c_group;
#elif GROUPS
  const int* tile = plan + 4 * blockIdx.y;
  if (tile[0] < 0) return;
  row0 = tile[1];
  m = tile[2];
  b += tile[0] * b_group;
#endif
  int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float acc[64] = {};
  int steps = (int)((k - k0 + BK - 1) / BK), loaded = 0;
#if LAYOUT == 2
  Share<64, 128, 128, false, BK, THREADS> a_share;
#else
  Share<128, 64, 64, true, BK, THREADS> a_share;
#endif
#if LAYOUT == 0
  Share<128, 64, 64, true, BK, THREADS> b_share;
#else
  Share<64, 128, 128, false, BK, THREADS> b_share;
#endif
  a_share.begin(a, a_s, row0, m, k0);
  b_share.begin(b, b_s, column0, n, k0);
  auto load = [&](int slot) {
    if (loaded < steps) {
      int left = loaded + 1 < steps ? BK : (int)(k - k0 - (i64)loaded * BK);
      a_share.load(a_tiles + slot * TILE, left, whole_a);
      b_share.load(b_tiles + slot * TILE, left, whole_b);
    }
    loaded++;
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) load(s);
  int slot = 0, next = STAGES - 1;
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    // What threads wrote is to be read by the other proxy; the last step's tile is free again.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();
    u32 a_at = shared_at(a_tiles + slot * TILE + group * HALF), b_at = shared_at(b_tiles + slot * TILE);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int kk = 0; kk < BK / 16; kk++)
      group_multiply(acc, described(a_at + kk * (LAYOUT == 2 ? 2048 : 32)), described(b_at + kk * (LAYOUT == 0 ? 32 : 2048)));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    load(next);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int j = 0; j < 16; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      i64 row = row0 + group * 64 + warp * 16 + lane / 4 + e / 2 * 8, column = column0 + 8 * j + lane % 4 * 2 + e % 2;
      if (row >= m || column >= n) continue;
      float value = acc[4 * j + e];
      if (bias) value = __fadd_rn(value, up(bias[column]));
      C* to = c + row * c_s + column;
      if (add) value = __fadd_rn(up(*to), value);
      put(to, value);
    }
}
