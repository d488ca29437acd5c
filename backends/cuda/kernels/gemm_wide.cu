// Matrix products in f32 by fused multiply-adds: f32 operands, and weights of few bits with scales.
//
// An element is one chain over k in ascending order, whatever the tile. T is a's type.
// LAYOUT and GROUPS as in gemm.cu. QUANT 0: b is of type T; 1: e4m3; 2: i8; 3: i4 (low half first).
// OUT32: c is f32, else T.
#define BK 16
#define TM (BM / 16)
#define TN (BN / 16)
#if OUT32
typedef float C;
#else
typedef T C;
#endif

DEV float few_bits(const u8* weight, i64 at) {
#if QUANT == 1
  u32 byte = weight[at], exponent = byte >> 3 & 15, fraction = byte & 7;
  float sign = byte & 0x80 ? -1.f : 1.f;
  if (exponent == 15 && fraction == 7) return NAN_F;
  if (exponent == 0) return sign * (float)fraction * 0.001953125f;
  return sign * __uint_as_float((exponent + 120) << 23 | fraction << 20);
#elif QUANT == 2
  return (float)(signed char)weight[at];
#else
  int nibble = weight[at >> 1] >> (at & 1) * 4 & 15;
  return (float)(nibble < 8 ? nibble : nibble - 16);
#endif
}

extern "C" __global__ void __launch_bounds__(256)
gemm_wide(const T* a, i64 a_s, const void* b_any, i64 b_s, C* c, i64 c_s, const T* bias, i64 m, i64 n, i64 k, i64 add,
          const int* plan, i64 b_group, i64 c_group, const float* scales, i64 block_n, i64 block_k, i64 scales_s,
          i64 scales_group) {
  __shared__ float a_tile[BK][BM + 4], b_tile[BK][BN + 4];
  i64 row0 = (i64)blockIdx.y * BM, column0 = (i64)blockIdx.x * BN, k0 = 0;
#if QUANT
  const u8* b = (const u8*)b_any;
  i64 b_base = 0;
#else
  const T* b = (const T*)b_any;
#endif
#if GROUPS && LAYOUT == 2
  k0 = plan[blockIdx.z];
  k = plan[blockIdx.z + 1];
  c += blockIdx.z * c_group;
#elif GROUPS
  const int* tile = plan + 4 * blockIdx.y;
  if (tile[0] < 0) return;
  row0 = tile[1];
  m = tile[2];
#if QUANT
  b_base = tile[0] * b_group;
  scales += tile[0] * scales_group;
#else
  b += tile[0] * b_group;
#endif
#endif
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[TM][TN] = {};
  for (i64 at = k0; at < k; at += BK) {
#pragma unroll
    for (int i = threadIdx.x; i < BM * BK; i += 256) {
#if LAYOUT == 2
      int kk = i / BM, r = i % BM;
      a_tile[kk][r] = at + kk < k && row0 + r < m ? up(a[(at + kk) * a_s + row0 + r]) : 0.f;
#else
      int kk = i % BK, r = i / BK;
      a_tile[kk][r] = at + kk < k && row0 + r < m ? up(a[(row0 + r) * a_s + at + kk]) : 0.f;
#endif
    }
#pragma unroll
    for (int i = threadIdx.x; i < BN * BK; i += 256) {
#if LAYOUT == 0
      int kk = i % BK, r = i / BK;
      bool inside = at + kk < k && column0 + r < n;
#if QUANT
      float scale = inside ? scales[(column0 + r) / block_n * scales_s + (at + kk) / block_k] : 0.f;
      b_tile[kk][r] = inside ? few_bits(b, b_base + (column0 + r) * b_s + at + kk) * scale : 0.f;
#else
      b_tile[kk][r] = inside ? up(b[(column0 + r) * b_s + at + kk]) : 0.f;
#endif
#else
      int kk = i / BN, r = i % BN;
      b_tile[kk][r] = at + kk < k && column0 + r < n ? up(b[(at + kk) * b_s + column0 + r]) : 0.f;
#endif
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      float fa[TM], fb[TN];
#pragma unroll
      for (int i = 0; i < TM; i++) fa[i] = a_tile[kk][ty + 16 * i];
#pragma unroll
      for (int j = 0; j < TN; j++) fb[j] = b_tile[kk][tx + 16 * j];
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) acc[i][j] = __fmaf_rn(fa[i], fb[j], acc[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) {
      i64 row = row0 + ty + 16 * i, column = column0 + tx + 16 * j;
      if (row >= m || column >= n) continue;
      float value = acc[i][j];
      if (bias) value = __fadd_rn(value, up(bias[column]));
      C* to = c + row * c_s + column;
      if (add) value = __fadd_rn(up(*to), value);
      put(to, value);
    }
}
