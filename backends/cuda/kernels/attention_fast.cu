// Attention and its gradients on the tensor cores: storage types of 16 bits, widths QK and VW that
// are multiples of 16, QK at least 64. What is computed is attention.cu's; probabilities are rounded before they
// meet a product. A block of four warps takes 64 rows of one head, 16 to a warp, and goes over the
// other side in tiles of 64.
#define SIDE 64
#define Q_PITCH (QK + 8)
#define V_PITCH (VW + 8)

// `count` rows of WIDTH elements, by where each begins; rows up to 64 are zero.
template <int WIDTH, int PITCH, class At>
DEV void load_rows(u16* tile, const At& at, int count, bool whole) {
  const int chunks = WIDTH / 8;
  for (int i = threadIdx.x; i < SIDE * chunks; i += 128) {
    int r = i / chunks, c = i % chunks * 8;
    const T* from = at(r < count ? r : 0);
    load_eight(tile + r * PITCH + c, from + c, from, r < count ? 8 : 0, whole);
  }
}
DEV void landed() {
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;");
  __syncthreads();
}

// s[j] = the warp's 16 rows of `a` times rows 8 j.. of `b`, over WIDTH.
template <int WIDTH, int PITCH> DEV void tile_scores(float s[8][4], const u16* a, const u16* b) {
  int lane = threadIdx.x % 32, low = lane % 8, bit3 = lane / 8 % 2 * 8, bit4 = lane / 16 * 8;
  u32 a_at = shared_at(a) + 2 * ((threadIdx.x / 32 * 16 + low + bit3) * PITCH + bit4);
  u32 b_at = shared_at(b) + 2 * ((low + bit4) * PITCH + bit3);
#pragma unroll
  for (int kk = 0; kk < WIDTH; kk += 16) {
    u32 fa[4], fb[4];
    matrices(fa, a_at + 2 * kk);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      matrices(fb, b_at + 2 * (16 * j * PITCH + kk));
      multiply(s[2 * j], fa, fb);
      multiply(s[2 * j + 1], fa, fb + 2);
    }
  }
}

DEV u32 pair(float low, float high) {
  T a, b;
  put(&a, low);
  put(&b, high);
  return (u32)a.bits | (u32)b.bits << 16;
}

// acc[n] += the warp's 16 x 64 of `p`, rounded, times 64 rows of `b`.
template <int WIDTH, int PITCH> DEV void tile_mix(float acc[WIDTH / 8][4], const float p[8][4], const u16* b) {
  int lane = threadIdx.x % 32, low = lane % 8, bit3 = lane / 8 % 2 * 8, bit4 = lane / 16 * 8;
  u32 b_at = shared_at(b) + 2 * ((low + bit3) * PITCH + bit4);
#pragma unroll
  for (int kk = 0; kk < 4; kk++) {
    const float *first = p[2 * kk], *second = p[2 * kk + 1];
    u32 fa[4] = {pair(first[0], first[1]), pair(first[2], first[3]), pair(second[0], second[1]), pair(second[2], second[3])};
#pragma unroll
    for (int n = 0; n < WIDTH / 16; n++) {
      u32 fb[4];
      matrices_turned(fb, b_at + 2 * (16 * kk * PITCH + 16 * n));
      multiply(acc[2 * n], fa, fb);
      multiply(acc[2 * n + 1], fa, fb + 2);
    }
  }
}

DEV float four_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}
DEV float four_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 2));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 1));
}

struct Keys {
  const T* base;
  i64 row_s, first;
  const int* blocks;
  i64 block;
  DEV const T* at(i64 j) const {
    if (!blocks) return base + (first + j) * row_s;
    return base + ((i64)blocks[j / block] * block + j % block) * row_s;
  }
};

// Whether all bits of the exponent are set.
DEV bool broken(u16 bits) {
#if DT == 1
  return (bits & 0x7f80) == 0x7f80;
#else
  return (bits & 0x7c00) == 0x7c00;
#endif
}

// Takes what is not finite out of a tile of values, so that keys which a row does not see cannot
// reach it; says whether there was any.
DEV bool mend(u16* tile) {
  int found = 0;
  for (int i = threadIdx.x; i < SIDE * VW; i += 128) {
    u16* at = tile + i / VW * V_PITCH + i % VW;
    if (broken(*at)) {
      *at = 0;
      found = 1;
    }
  }
  return __syncthreads_or(found);
}

extern "C" __global__ void __launch_bounds__(128)
attention(const T* q, i64 q_row, i64 q_head, const T* k, i64 k_row, i64 k_head, const T* v, i64 v_row, i64 v_head, T* out,
          i64 out_row, i64 out_head, float* lse, i64 lse_row, float scale, i64 per_kv, const int* plan, const int* blocks,
          i64 blocks_max, i64 block, i64 whole) {
  extern __shared__ __align__(16) u16 shared[];
  u16 *q_tile = shared, *k_tile = q_tile + SIDE * Q_PITCH, *v_tile = k_tile + SIDE * Q_PITCH;
  const int* tile = plan + 4 * (i64)blockIdx.x;
  if (tile[0] < 0) return;
  i64 first = tile[1], position = tile[3], head = blockIdx.y, kv = head / per_kv;
  int count = tile[2] - tile[1] < SIDE ? tile[2] - tile[1] : SIDE;
  const int* own_blocks = blocks ? blocks + tile[0] * blocks_max : nullptr;
  Keys keys = {k + kv * k_head, k_row, first - position, own_blocks, block};
  Keys values = {v + kv * v_head, v_row, first - position, own_blocks, block};
  load_rows<QK, Q_PITCH>(q_tile, [&](int r) { return q + (first + r) * q_row + head * q_head; }, count, whole);
  int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  float acc[VW / 8][4] = {}, top[2] = {-INF, -INF}, sum[2] = {};
  i64 all = position + count;
  for (i64 j0 = 0; j0 < all; j0 += SIDE) {
    int here = all - j0 < SIDE ? (int)(all - j0) : SIDE;
    __syncthreads();
    load_rows<QK, Q_PITCH>(k_tile, [&](int r) { return keys.at(j0 + r); }, here, whole);
    load_rows<VW, V_PITCH>(v_tile, [&](int r) { return values.at(j0 + r); }, here, whole);
    landed();
    bool spoilt = j0 + SIDE > position + 1 && mend(v_tile);
    float s[8][4] = {};
    tile_scores<QK, Q_PITCH>(s, q_tile, k_tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int r = own + 8 * i;
      i64 reach = position + r + 1 - j0;
      int limit = r >= count || reach < 0 ? 0 : reach > SIDE ? SIDE : (int)reach;
      float best = -INF;
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float* at = &s[j][2 * i + e];
          *at = 8 * j + column + e < limit ? __fmul_rn(*at, scale) : -INF;
          best = fmaxf(best, *at);
        }
      best = fmaxf(top[i], four_max(best));
      float shift = best == -INF ? 0.f : best;
      float keep = best == top[i] ? 1.f : expf(top[i] - shift);
      float part = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float* at = &s[j][2 * i + e];
          *at = 8 * j + column + e < limit ? expf(__fadd_rn(*at, -shift)) : 0.f;
          part = __fadd_rn(part, *at);
        }
      sum[i] = __fmaf_rn(sum[i], keep, four_sum(part));
      top[i] = best;
#pragma unroll
      for (int n = 0; n < VW / 8; n++) {
        acc[n][2 * i] = __fmul_rn(acc[n][2 * i], keep);
        acc[n][2 * i + 1] = __fmul_rn(acc[n][2 * i + 1], keep);
      }
    }
    tile_mix<VW, V_PITCH>(acc, s, v_tile);
    if (spoilt) {
      // Rare and slow: what was taken out reaches the rows that see it, through shared memory.
      __syncthreads();
      T* p = (T*)k_tile;
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int r = own + e / 2 * 8;
          put(p + r * SIDE + 8 * j + column + e % 2, s[j][e]);
        }
      __syncthreads();
      for (int j = 0; j < here; j++) {
        const T* from = values.at(j0 + j);
#pragma unroll
        for (int n = 0; n < VW / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            int r = own + e / 2 * 8;
            T value = from[8 * n + column + e % 2];
            if (j0 + j > position + r || !broken(value.bits)) continue;
            acc[n][e] += up(p[r * SIDE + j]) * up(value);
          }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int r = own + 8 * i;
    if (r >= count) continue;
    T* to = out + (first + r) * out_row + head * out_head + column;
#pragma unroll
    for (int n = 0; n < VW / 8; n++) {
      put(to + 8 * n, acc[n][2 * i] / sum[i]);
      put(to + 8 * n + 1, acc[n][2 * i + 1] / sum[i]);
    }
    if (lse && lane % 4 == 0) lse[(first + r) * lse_row + head] = top[i] == -INF ? NAN_F : top[i] + logf(sum[i]);
  }
}

struct Backward {
  const T *q, *k, *v, *dout;
  i64 q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head;
  const float* lse;
  i64 lse_row;
  const float* delta;
  i64 heads, per_kv;
  T *dq, *dk, *dv;
  i64 dq_row, dq_head, dk_row, dk_head, dv_row, dv_head;
  const int* plan;
  float scale;
  int whole;
};

template <int WIDTH> DEV void store_rows(const float acc[WIDTH / 8][4], float factor, T* to, i64 row_s, int count) {
  int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int r = own + 8 * i;
    if (r >= count) continue;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
      put(to + r * row_s + 8 * n + column, factor * acc[n][2 * i]);
      put(to + r * row_s + 8 * n + column + 1, factor * acc[n][2 * i + 1]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(128) attention_dq(Backward w) {
  extern __shared__ __align__(16) u16 shared[];
  u16 *q_tile = shared, *d_tile = q_tile + SIDE * Q_PITCH, *k_tile = d_tile + SIDE * V_PITCH, *v_tile = k_tile + SIDE * Q_PITCH;
  const int* tile = w.plan + 4 * (i64)blockIdx.x;
  if (tile[0] < 0) return;
  i64 first = tile[1], position = tile[3], head = blockIdx.y, kv = head / w.per_kv, start = first - position;
  int count = tile[2] - tile[1] < SIDE ? tile[2] - tile[1] : SIDE;
  int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  load_rows<QK, Q_PITCH>(q_tile, [&](int r) { return w.q + (first + r) * w.q_row + head * w.q_head; }, count, w.whole);
  load_rows<VW, V_PITCH>(d_tile, [&](int r) { return w.dout + (first + r) * w.dout_row + head * w.dout_head; }, count, w.whole);
  float acc[QK / 8][4] = {}, lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    i64 row = first + (own + 8 * i < count ? own + 8 * i : 0);
    lse[i] = w.lse[row * w.lse_row + head];
    delta[i] = w.delta[row * w.heads + head];
  }
  i64 all = position + count;
  for (i64 j0 = 0; j0 < all; j0 += SIDE) {
    int here = all - j0 < SIDE ? (int)(all - j0) : SIDE;
    __syncthreads();
    load_rows<QK, Q_PITCH>(k_tile, [&](int r) { return w.k + (start + j0 + r) * w.k_row + kv * w.k_head; }, here, w.whole);
    load_rows<VW, V_PITCH>(v_tile, [&](int r) { return w.v + (start + j0 + r) * w.v_row + kv * w.v_head; }, here, w.whole);
    landed();
    float s[8][4] = {}, dp[8][4] = {};
    tile_scores<QK, Q_PITCH>(s, q_tile, k_tile);
    tile_scores<VW, V_PITCH>(dp, d_tile, v_tile);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int r = own + e / 2 * 8;
        bool seen = r < count && j0 + 8 * j + column + e % 2 <= position + r;
        float p = expf(__fmaf_rn(s[j][e], w.scale, -lse[e / 2]));
        s[j][e] = seen ? p * (dp[j][e] - delta[e / 2]) : 0.f;
      }
    tile_mix<QK, Q_PITCH>(acc, s, k_tile);
  }
  store_rows<QK>(acc, w.scale, w.dq + first * w.dq_row + head * w.dq_head, w.dq_row, count);
}

extern "C" __global__ void __launch_bounds__(128) attention_dkv(Backward w) {
  extern __shared__ __align__(16) u16 shared[];
  u16 *k_tile = shared, *v_tile = k_tile + SIDE * Q_PITCH, *q_tile = v_tile + SIDE * V_PITCH, *d_tile = q_tile + SIDE * Q_PITCH;
  __shared__ float lse[SIDE], delta[SIDE];
  const int* tile = w.plan + 4 * (i64)blockIdx.x;
  if (tile[0] < 0) return;
  i64 first = tile[1], end = tile[2], kv = blockIdx.y;
  int count = end - first < SIDE ? (int)(end - first) : SIDE;
  int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  load_rows<QK, Q_PITCH>(k_tile, [&](int r) { return w.k + (first + r) * w.k_row + kv * w.k_head; }, count, w.whole);
  load_rows<VW, V_PITCH>(v_tile, [&](int r) { return w.v + (first + r) * w.v_row + kv * w.v_head; }, count, w.whole);
  float dk[QK / 8][4] = {}, dv[VW / 8][4] = {};
  for (i64 head = kv * w.per_kv; head < (kv + 1) * w.per_kv; head++)
    for (i64 r0 = first; r0 < end; r0 += SIDE) {
      int here = end - r0 < SIDE ? (int)(end - r0) : SIDE;
      __syncthreads();
      load_rows<QK, Q_PITCH>(q_tile, [&](int r) { return w.q + (r0 + r) * w.q_row + head * w.q_head; }, here, w.whole);
      load_rows<VW, V_PITCH>(d_tile, [&](int r) { return w.dout + (r0 + r) * w.dout_row + head * w.dout_head; }, here, w.whole);
      if (threadIdx.x < SIDE) {
        i64 row = r0 + ((int)threadIdx.x < here ? threadIdx.x : 0);
        lse[threadIdx.x] = w.lse[row * w.lse_row + head];
        delta[threadIdx.x] = w.delta[row * w.heads + head];
      }
      landed();
      float p[8][4] = {}, ds[8][4] = {};
      tile_scores<QK, Q_PITCH>(p, k_tile, q_tile);
      tile_scores<VW, V_PITCH>(ds, v_tile, d_tile);
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int other = 8 * j + column + e % 2;
          bool seen = other < here && r0 + other >= first + own + e / 2 * 8;
          p[j][e] = seen ? expf(__fmaf_rn(p[j][e], w.scale, -lse[other])) : 0.f;
          ds[j][e] = seen ? p[j][e] * (ds[j][e] - delta[other]) : 0.f;
        }
      tile_mix<VW, V_PITCH>(dv, p, d_tile);
      tile_mix<QK, Q_PITCH>(dk, ds, q_tile);
    }
  store_rows<QK>(dk, w.scale, w.dk + first * w.dk_row + kv * w.dk_head, w.dk_row, count);
  store_rows<VW>(dv, 1.f, w.dv + first * w.dv_row + kv * w.dv_head, w.dv_row, count);
}
