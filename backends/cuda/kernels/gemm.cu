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

DEV u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void copy_16(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

// Rows of a tile from `row` on of a matrix with `rows` rows, columns from `column` on of `columns`;
// what lies outside is zero. Whole: rows begin at multiples of 16 bytes.
template <int ROWS, int WIDTH, int PITCH>
DEV void load_tile(u16* tile, const T* from, i64 stride, i64 row, i64 rows, i64 column, i64 columns, bool whole) {
  const int chunks = WIDTH / 8;
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * chunks; i += THREADS) {
    int r = i / chunks, c = i % chunks * 8;
    i64 left = row + r < rows ? columns - column - c : 0;
    int count = left < 0 ? 0 : left > 8 ? 8 : (int)left;
    const T* source = from + (row + r) * stride + column + c;
    u16* to = tile + r * PITCH + c;
    if (whole) {
      copy_16(shared_at(to), count ? source : from, 2 * count);
    } else {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 low = 2 * j < count ? source[2 * j].bits : 0, high = 2 * j + 1 < count ? source[2 * j + 1].bits : 0;
        words[j] = low | high << 16;
      }
      *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

DEV void matrices(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEV void matrices_turned(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEV void multiply(float* c, const u32* a, const u32* b) {
#if DT == 1
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

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
  i64 steps = (k - k0 + BK - 1) / BK;
  auto load = [&](i64 step) {
    if (step < steps) {
      int slot = (int)(step % STAGES);
      i64 at = k0 + step * BK;
#if LAYOUT == 2
      load_tile<A_ROWS, A_WIDTH, A_PITCH>(a_tiles + slot * A_TILE, a, a_s, at, k, row0, m, whole_a);
#else
      load_tile<A_ROWS, A_WIDTH, A_PITCH>(a_tiles + slot * A_TILE, a, a_s, row0, m, at, k, whole_a);
#endif
#if LAYOUT == 0
      load_tile<B_ROWS, B_WIDTH, B_PITCH>(b_tiles + slot * B_TILE, b, b_s, column0, n, at, k, whole_b);
#else
      load_tile<B_ROWS, B_WIDTH, B_PITCH>(b_tiles + slot * B_TILE, b, b_s, at, k, column0, n, whole_b);
#endif
    }
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) load(s);
  int low = lane % 8, bit3 = lane / 8 % 2 * 8, bit4 = lane / 16 * 8;
  for (i64 step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    load(step + STAGES - 1);
    int slot = (int)(step % STAGES);
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
