// Matrix products of 16-bit elements on the tensor cores, accumulated in f32.
//
// An element is one chain of m16n8k16 steps over k in ascending order, whatever the tile: a tile's
// extents (BM, BN by WARPS_M x WARPS_N warps) change how fast it goes and no bit.
// LAYOUT 0: a [m,k], b [n,k]; 1: a [m,k], b [k,n]; 2: a [k,m], b [k,n]. OUT32: c is f32.
// GROUPS: one product for each group of rows; `plan` holds tiles (layouts 0, 1) or offsets (2).
#define BK 32
#define THREADS (WARPS_M * WARPS_N * 32)
#define WM (BM / WARPS_M)
#define WN (BN / WARPS_N)
#define MT (WM / 16)
#define NT (WN / 8)
#if LAYOUT == 2
#define A_ROWS BK
#define A_WIDTH BM
#else
#define A_ROWS BM
#define A_WIDTH BK
#endif
#if LAYOUT == 0
#define B_ROWS BN
#define B_WIDTH BK
#else
#define B_ROWS BK
#define B_WIDTH BN
#endif
// Eight more elements keep eight rows' 16 bytes in different banks.
#define A_PITCH (A_WIDTH + 8)
#define B_PITCH (B_WIDTH + 8)
#define A_TILE (A_ROWS * A_PITCH)
#define B_TILE (B_ROWS * B_PITCH)
#if OUT32
typedef float C;
#else
typedef T C;
#endif

template <int PITCH> DEV int place_in_tile(int r, int c) { return r * PITCH + c; }

extern "C" __global__ void __launch_bounds__(THREADS)
gemm(const T* a, i64 a_s, const T* b, i64 b_s, C* c, i64 c_s, const T* bias, i64 m, i64 n, i64 k, i64 add,
     i64 whole_a, i64 whole_b, const int* plan, i64 b_group, i64 c_group) {
  extern __shared__ __align__(16) u16 shared[];
  u16 *a_tiles = shared, *b_tiles = shared + STAGES * A_TILE;
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
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int wm = warp / WARPS_N * WM, wn = warp % WARPS_N * WN;
  float acc[MT][NT][4] = {};
  int steps = (int)((k - k0 + BK - 1) / BK), loaded = 0;
  Share<A_ROWS, A_WIDTH, A_PITCH, LAYOUT != 2, BK, THREADS> a_share;
  Share<B_ROWS, B_WIDTH, B_PITCH, LAYOUT == 0, BK, THREADS> b_share;
  a_share.begin(a, a_s, row0, m, k0);
  b_share.begin(b, b_s, column0, n, k0);
  auto load = [&](int slot) {
    if (loaded < steps) {
      int left = loaded + 1 < steps ? BK : (int)(k - k0 - (i64)loaded * BK);
      a_share.load(a_tiles + slot * A_TILE, left, whole_a);
      b_share.load(b_tiles + slot * B_TILE, left, whole_b);
    }
    loaded++;
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) load(s);
  int low = lane % 8, bit3 = lane / 8 % 2 * 8, bit4 = lane / 16 * 8;
  int slot = 0, next = STAGES - 1;
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    load(next);
    u32 a_at = shared_at(a_tiles + slot * A_TILE), b_at = shared_at(b_tiles + slot * B_TILE);
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      u32 fa[MT][4], fb[NT / 2][4];
#pragma unroll
      for (int i = 0; i < MT; i++)
#if LAYOUT == 2
        matrices_turned(fa[i], a_at + 2 * ((kk + low + bit4) * A_PITCH + wm + 16 * i + bit3));
#else
        matrices(fa[i], a_at + 2 * ((wm + 16 * i + low + bit3) * A_PITCH + kk + bit4));
#endif
#pragma unroll
      for (int j = 0; j < NT / 2; j++)
#if LAYOUT == 0
        matrices(fb[j], b_at + 2 * ((wn + 16 * j + low + bit4) * B_PITCH + kk + bit3));
#else
        matrices_turned(fb[j], b_at + 2 * ((kk + low + bit3) * B_PITCH + wn + 16 * j + bit4));
#endif
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) multiply(acc[i][j], fa[i], fb[j / 2] + 2 * (j % 2));
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        i64 row = row0 + wm + 16 * i + lane / 4 + e / 2 * 8, column = column0 + wn + 8 * j + lane % 4 * 2 + e % 2;
        if (row >= m || column >= n) continue;
        float value = acc[i][j][e];
        if (bias) value = __fadd_rn(value, up(bias[column]));
        C* to = c + row * c_s + column;
        if (add) value = __fadd_rn(up(*to), value);
        put(to, value);
      }
}
