// Causal attention over packed documents and over a paged cache, and its gradients, in f32.
//
// QK and VW are the widths of keys and values; compiled for each pair. A block of 128 threads takes
// 32 rows of one head and goes over the other side in tiles of 64; the plan says which rows.
#define MINE 32
#define OTHERS 64
#define CHUNK 32
#define QN ((QK + 15) / 16)
#define VN ((VW + 15) / 16)

// Where keys lie: in order from a document's start, or in the blocks of a sequence.
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

// s[i][j] += sum over c of mine[ty + 8 i][c] * other[tx + 16 j][c], c ascending. Rows from
// `mine_count` and `other_count` on are zero.
template <int WIDTH, class M, class O>
DEV void scores(float s[4][4], const M& mine, i64 mine_count, const O& other, i64 other_count, float a[MINE][CHUNK + 1],
                float b[OTHERS][CHUNK + 1]) {
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int c0 = 0; c0 < WIDTH; c0 += CHUNK) {
    __syncthreads();
    int c = threadIdx.x % CHUNK;
    for (int r = threadIdx.x / CHUNK; r < MINE; r += 128 / CHUNK)
      a[r][c] = r < mine_count && c0 + c < WIDTH ? up(mine(r)[c0 + c]) : 0.f;
    for (int r = threadIdx.x / CHUNK; r < OTHERS; r += 128 / CHUNK)
      b[r][c] = r < other_count && c0 + c < WIDTH ? up(other(r)[c0 + c]) : 0.f;
    __syncthreads();
    const int end = WIDTH - c0 < CHUNK ? WIDTH - c0 : CHUNK;
#pragma unroll 8
    for (int k = 0; k < end; k++) {
      float fa[4], fb[4];
#pragma unroll
      for (int i = 0; i < 4; i++) fa[i] = a[ty + 8 * i][k];
#pragma unroll
      for (int j = 0; j < 4; j++) fb[j] = b[tx + 16 * j][k];
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = __fmaf_rn(fa[i], fb[j], s[i][j]);
    }
  }
}

// acc[i][n] += sum over j of p[ty + 8 i][j] * other[j][tx + 16 n], j ascending below limit[i].
template <int WIDTH, int N, class O>
DEV void mix(float acc[4][N], float p[MINE][OTHERS + 1], const int limit[4], const O& other, i64 other_count,
             float b[OTHERS][CHUNK + 1]) {
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int n0 = 0; n0 < N; n0 += 2) {
    __syncthreads();
    int c = threadIdx.x % CHUNK;
    for (int r = threadIdx.x / CHUNK; r < OTHERS; r += 128 / CHUNK)
      b[r][c] = r < other_count && n0 * 16 + c < WIDTH ? up(other(r)[n0 * 16 + c]) : 0.f;
    __syncthreads();
    for (int j = 0; j < OTHERS; j++) {
      float first = b[j][tx], second = b[j][tx + 16];
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (j < limit[i]) {
          float w = p[ty + 8 * i][j];
          acc[i][n0] = __fmaf_rn(w, first, acc[i][n0]);
          if (n0 + 1 < N) acc[i][n0 + 1] = __fmaf_rn(w, second, acc[i][n0 + 1]);
        }
    }
  }
}

DEV float sixteen_max(float x) {
  for (int o = 8; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
DEV float sixteen_sum(float x) {
  for (int o = 8; o > 0; o >>= 1) x = __fadd_rn(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

extern "C" __global__ void __launch_bounds__(128)
attention(const T* q, i64 q_row, i64 q_head, const T* k, i64 k_row, i64 k_head, const T* v, i64 v_row, i64 v_head, T* out,
          i64 out_row, i64 out_head, float* lse, i64 lse_row, float scale, i64 per_kv, const int* plan, const int* blocks,
          i64 blocks_max, i64 block, i64 whole) {
  __shared__ float a[MINE][CHUNK + 1], b[OTHERS][CHUNK + 1], p[MINE][OTHERS + 1];
  const int* tile = plan + 4 * (i64)blockIdx.x;
  if (tile[0] < 0) return;
  i64 first = tile[1], position = tile[3], head = blockIdx.y, kv = head / per_kv;
  int count = tile[2] - tile[1] < MINE ? tile[2] - tile[1] : MINE;
  const int* own_blocks = blocks ? blocks + tile[0] * blocks_max : nullptr;
  Keys keys = {k + kv * k_head, k_row, first - position, own_blocks, block};
  Keys values = {v + kv * v_head, v_row, first - position, own_blocks, block};
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[4][VN] = {}, top[4], sum[4] = {};
  for (int i = 0; i < 4; i++) top[i] = -INF;
  auto mine = [&](int r) { return q + (first + r) * q_row + head * q_head; };
  i64 all = position + count;
  for (i64 j0 = 0; j0 < all; j0 += OTHERS) {
    i64 here = all - j0 < OTHERS ? all - j0 : OTHERS;
    float s[4][4] = {};
    scores<QK>(s, mine, count, [&](int r) { return keys.at(j0 + r); }, here, a, b);
    int limit[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = ty + 8 * i;
      i64 reach = position + r + 1 - j0;
      limit[i] = r >= count || reach < 0 ? 0 : reach > OTHERS ? OTHERS : (int)reach;
      float best = -INF;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        s[i][j] = tx + 16 * j < limit[i] ? __fmul_rn(s[i][j], scale) : -INF;
        best = fmaxf(best, s[i][j]);
      }
      best = fmaxf(top[i], sixteen_max(best));
      float shift = best == -INF ? 0.f : best;
      float keep = best == top[i] ? 1.f : expf(top[i] - shift);
      float part = 0.f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float e = tx + 16 * j < limit[i] ? expf(__fadd_rn(s[i][j], -shift)) : 0.f;
        p[r][tx + 16 * j] = e;
        part = __fadd_rn(part, e);
      }
      sum[i] = __fmaf_rn(sum[i], keep, sixteen_sum(part));
      top[i] = best;
#pragma unroll
      for (int n = 0; n < VN; n++) acc[i][n] = __fmul_rn(acc[i][n], keep);
    }
    mix<VW, VN>(acc, p, limit, [&](int r) { return values.at(j0 + r); }, here, b);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int r = ty + 8 * i;
    if (r >= count) continue;
#pragma unroll
    for (int n = 0; n < VN; n++) {
      int c = tx + 16 * n;
      if (c < VW) put(out + (first + r) * out_row + head * out_head + c, acc[i][n] / sum[i]);
    }
    if (lse && tx == 0) lse[(first + r) * lse_row + head] = top[i] == -INF ? NAN_F : top[i] + logf(sum[i]);
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

extern "C" __global__ void __launch_bounds__(128) attention_dq(Backward w) {
  __shared__ float a[MINE][CHUNK + 1], b[OTHERS][CHUNK + 1], ds[MINE][OTHERS + 1];
  const int* tile = w.plan + 4 * (i64)blockIdx.x;
  if (tile[0] < 0) return;
  i64 first = tile[1], position = tile[3], head = blockIdx.y, kv = head / w.per_kv, start = first - position;
  int count = tile[2] - tile[1] < MINE ? tile[2] - tile[1] : MINE;
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[4][QN] = {}, lse[4], delta[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    i64 row = first + (ty + 8 * i < count ? ty + 8 * i : 0);
    lse[i] = w.lse[row * w.lse_row + head];
    delta[i] = w.delta[row * w.heads + head];
  }
  auto mine_q = [&](int r) { return w.q + (first + r) * w.q_row + head * w.q_head; };
  auto mine_d = [&](int r) { return w.dout + (first + r) * w.dout_row + head * w.dout_head; };
  i64 all = position + count;
  for (i64 j0 = 0; j0 < all; j0 += OTHERS) {
    i64 here = all - j0 < OTHERS ? all - j0 : OTHERS;
    auto key = [&](int r) { return w.k + (start + j0 + r) * w.k_row + kv * w.k_head; };
    auto value = [&](int r) { return w.v + (start + j0 + r) * w.v_row + kv * w.v_head; };
    float s[4][4] = {}, dp[4][4] = {};
    scores<QK>(s, mine_q, count, key, here, a, b);
    scores<VW>(dp, mine_d, count, value, here, a, b);
    int limit[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = ty + 8 * i;
      i64 reach = position + r + 1 - j0;
      limit[i] = r >= count || reach < 0 ? 0 : reach > OTHERS ? OTHERS : (int)reach;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float p = expf(__fmaf_rn(s[i][j], w.scale, -lse[i]));
        ds[r][tx + 16 * j] = tx + 16 * j < limit[i] ? p * (dp[i][j] - delta[i]) : 0.f;
      }
    }
    mix<QK, QN>(acc, ds, limit, key, here, b);
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int n = 0; n < QN; n++) {
      int r = ty + 8 * i, c = tx + 16 * n;
      if (r < count && c < QK) put(w.dq + (first + r) * w.dq_row + head * w.dq_head + c, w.scale * acc[i][n]);
    }
}

extern "C" __global__ void __launch_bounds__(128) attention_dkv(Backward w) {
  __shared__ float a[MINE][CHUNK + 1], b[OTHERS][CHUNK + 1], p[MINE][OTHERS + 1], ds[MINE][OTHERS + 1];
  const int* tile = w.plan + 4 * (i64)blockIdx.x;
  if (tile[0] < 0) return;
  i64 first = tile[1], end = tile[2], kv = blockIdx.y;
  int count = end - first < MINE ? (int)(end - first) : MINE;
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float dk[4][QN] = {}, dv[4][VN] = {};
  auto key = [&](int r) { return w.k + (first + r) * w.k_row + kv * w.k_head; };
  auto value = [&](int r) { return w.v + (first + r) * w.v_row + kv * w.v_head; };
  const int limit[4] = {OTHERS, OTHERS, OTHERS, OTHERS};
  for (i64 head = kv * w.per_kv; head < (kv + 1) * w.per_kv; head++)
    for (i64 r0 = first; r0 < end; r0 += OTHERS) {
      i64 here = end - r0 < OTHERS ? end - r0 : OTHERS;
      auto query = [&](int r) { return w.q + (r0 + r) * w.q_row + head * w.q_head; };
      auto upstream = [&](int r) { return w.dout + (r0 + r) * w.dout_row + head * w.dout_head; };
      float s[4][4] = {}, dp[4][4] = {};
      scores<QK>(s, key, count, query, here, a, b);
      scores<VW>(dp, value, count, upstream, here, a, b);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int other = tx + 16 * j;
        i64 row = r0 + (other < here ? other : 0);
        float lse = w.lse[row * w.lse_row + head], delta = w.delta[row * w.heads + head];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int r = ty + 8 * i;
          bool seen = other < here && r0 + other >= first + r;
          float e = seen ? expf(__fmaf_rn(s[i][j], w.scale, -lse)) : 0.f;
          p[r][other] = e;
          ds[r][other] = seen ? e * (dp[i][j] - delta) : 0.f;
        }
      }
      mix<VW, VN>(dv, p, limit, upstream, here, b);
      mix<QK, QN>(dk, ds, limit, query, here, b);
    }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int r = ty + 8 * i;
    if (r >= count) continue;
#pragma unroll
    for (int n = 0; n < QN; n++)
      if (tx + 16 * n < QK) put(w.dk + (first + r) * w.dk_row + kv * w.dk_head + tx + 16 * n, w.scale * dk[i][n]);
#pragma unroll
    for (int n = 0; n < VN; n++)
      if (tx + 16 * n < VW) put(w.dv + (first + r) * w.dv_row + kv * w.dv_head + tx + 16 * n, dv[i][n]);
  }
}
