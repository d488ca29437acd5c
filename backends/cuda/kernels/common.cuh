// What every kernel uses: storage types and their rounding, reductions in one fixed order.
//
// Compiled by NVRTC without any header. DT says what `T` is: 0 f32, 1 bf16, 2 f16.
#define DEV __device__ __forceinline__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INF __int_as_float(0x7f800000)
#define NAN_F __int_as_float(0x7fffffff)

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

DEV float up(float x) { return x; }
DEV float up(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEV float up(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }

// One rounding to nearest, ties to even; NaN stays NaN.
DEV void put(float* to, float x) { *to = x; }
DEV void put(bf16* to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
DEV void put(f16* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
template <class S> DEV float rounded(float x) { S s; put(&s, x); return up(s); }

#if DT == 1
typedef bf16 T;
#elif DT == 2
typedef f16 T;
#else
typedef float T;
#endif

// Butterflies: every lane gets the same bits, in an order that depends on nothing.
DEV float warp_sum(float x) {
  for (int o = 16; o > 0; o >>= 1) x = __fadd_rn(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
DEV float warp_max(float x) {
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
DEV u64 warp_sum_u64(u64 x) {
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// Over a block of whole warps; `room` holds one value for each warp.
DEV float block_sum(float x, float* room) {
  x = warp_sum(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
  __syncthreads();
  float all = 0.f;
  for (int w = 0; w < (int)(blockDim.x >> 5); w++) all = __fadd_rn(all, room[w]);
  return all;
}
DEV float block_max(float x, float* room) {
  x = warp_max(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
  __syncthreads();
  float all = -INF;
  for (int w = 0; w < (int)(blockDim.x >> 5); w++) all = fmaxf(all, room[w]);
  return all;
}
DEV u64 block_sum_u64(u64 x, u64* room) {
  x = warp_sum_u64(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
  __syncthreads();
  u64 all = 0;
  for (int w = 0; w < (int)(blockDim.x >> 5); w++) all += room[w];
  return all;
}

// Up to three operands over one index space of four dimensions.
struct Dims {
  i64 d[4];
  i64 s[3][4];
};
DEV void places(const Dims& dims, u32 i, i64* o) {
  u32 c3 = i % (u32)dims.d[3]; i /= (u32)dims.d[3];
  u32 c2 = i % (u32)dims.d[2]; i /= (u32)dims.d[2];
  u32 c1 = i % (u32)dims.d[1], c0 = i / (u32)dims.d[1];
#pragma unroll
  for (int k = 0; k < 3; k++)
    o[k] = c0 * dims.s[k][0] + c1 * dims.s[k][1] + c2 * dims.s[k][2] + c3 * dims.s[k][3];
}

#define INDEX ((i64)blockIdx.x * blockDim.x + threadIdx.x)

// A row of logits: its peak, the sum of exp(sharpness * (logit - peak)) and of that times the
// exponent. One order for a block of 512 threads, whoever asks.
struct RowSums { float peak, total, weighted; };
DEV RowSums row_sums(const float* logits, i64 vocabulary, float sharpness, float* room) {
  float peak = -INF;
  for (i64 i = threadIdx.x; i < vocabulary; i += blockDim.x) peak = fmaxf(peak, logits[i]);
  peak = block_max(peak, room);
  float total = 0.f, weighted = 0.f;
  for (i64 i = threadIdx.x; i < vocabulary; i += blockDim.x) {
    float apart = __fmul_rn(__fadd_rn(logits[i], -peak), sharpness);
    float e = expf(apart);
    total = __fadd_rn(total, e);
    // 0 * -inf where a logit is -inf: it contributes nothing.
    if (e != 0.f) weighted = __fmaf_rn(e, apart, weighted);
  }
  total = block_sum(total, room);
  weighted = block_sum(weighted, room);
  return RowSums{peak, total, weighted};
}
#define IGNORED -100
DEV float row_log_prob(const float* logits, i64 vocabulary, int target, float sharpness, float lse) {
  if (target >= 0 && target < vocabulary) return __fmaf_rn(logits[target], sharpness, -lse);
  return target == IGNORED ? 0.f : NAN_F;
}
DEV float row_lse(RowSums s, float sharpness) {
  return __fmaf_rn(s.peak, sharpness, logf(s.total));
}
