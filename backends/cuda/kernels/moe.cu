// Mixtures of experts: choosing, sorting rows by expert, joining.

struct Best { float value; int index; };
// The largest value, the lowest index on ties; what is NaN never wins.
DEV Best warp_best(Best b) {
  for (int o = 16; o > 0; o >>= 1) {
    float value = __shfl_xor_sync(~0u, b.value, o);
    int index = __shfl_xor_sync(~0u, b.index, o);
    bool better = index >= 0 && (b.index < 0 || value > b.value || (value == b.value && index < b.index));
    if (better) { b.value = value; b.index = index; }
  }
  return b;
}
DEV Best best_of(const float* values, int count) {
  Best b = {0.f, -1};
  for (int i = threadIdx.x; i < count; i += 32) {
    float v = values[i];
    if (v == v && (b.index < 0 || v > b.value)) { b.value = v; b.index = i; }
  }
  return warp_best(b);
}

// A row's scores into shared memory. One warp.
DEV void row_scores(const float* logits, int count, i64 sigmoid, float* scores) {
  if (sigmoid) {
    for (int i = threadIdx.x; i < count; i += 32) scores[i] = 1.f / (1.f + expf(-logits[i]));
  } else {
    float peak = -INF, total = 0.f;
    for (int i = threadIdx.x; i < count; i += 32) peak = fmaxf(peak, logits[i]);
    peak = warp_max(peak);
    for (int i = threadIdx.x; i < count; i += 32) {
      float e = expf(logits[i] - peak);
      scores[i] = e;
      total += e;
    }
    total = warp_sum(total);
    for (int i = threadIdx.x; i < count; i += 32) scores[i] /= total;
  }
  __syncwarp();
}

#define SUM_EPS 1e-20f
extern "C" __global__ void router(const float* logits, i64 logits_s, const float* bias, i64 experts, i64 chosen, i64 sigmoid,
                                  i64 groups, i64 groups_kept, i64 renormalise, float scale, float* weights, i64 weights_s,
                                  int* ids, i64 ids_s) {
  extern __shared__ float room[];
  float *scores = room, *biased = room + experts, *ranks = room + 2 * experts;
  i64 row = blockIdx.x;
  const float* own = logits + row * logits_s;
  int count = (int)experts, lane = threadIdx.x, broken = 0;
  for (int i = lane; i < count; i += 32) broken |= own[i] != own[i];
  if (__any_sync(~0u, broken)) {
    for (int j = lane; j < chosen; j += 32) { weights[row * weights_s + j] = NAN_F; ids[row * ids_s + j] = j; }
    return;
  }
  row_scores(own, count, sigmoid, scores);
  for (int i = lane; i < count; i += 32) biased[i] = scores[i] + (bias ? bias[i] : 0.f);
  __syncwarp();
  if (groups > 1) {
    int size = count / (int)groups;
    for (int g = lane; g < groups; g += 32) {
      float first = -INF, second = -INF;
      for (int i = g * size; i < (g + 1) * size; i++) {
        float v = biased[i];
        if (v > first) { second = first; first = v; } else if (v > second) second = v;
      }
      ranks[g] = first + second;
    }
    __syncwarp();
    for (i64 kept = 0; kept < groups_kept; kept++) {
      Best b = best_of(ranks, (int)groups);
      if (lane == 0 && b.index >= 0) ranks[b.index] = NAN_F;
      __syncwarp();
    }
    // What was kept is NaN now.
    for (int i = lane; i < count; i += 32) {
      float rank = ranks[i / size];
      if (rank == rank) biased[i] = -INF;
    }
    __syncwarp();
  }
  float total = 0.f;
  for (i64 j = 0; j < chosen; j++) {
    Best b = best_of(biased, count);
    int index = b.index < 0 ? 0 : b.index;
    total += scores[index];
    if (lane == 0) { ids[row * ids_s + j] = index; biased[index] = NAN_F; weights[row * weights_s + j] = scores[index]; }
    __syncwarp();
  }
  float divisor = renormalise ? total + (sigmoid ? SUM_EPS : 0.f) : 1.f;
  for (int j = lane; j < chosen; j += 32) {
    float* to = weights + row * weights_s + j;
    *to = *to / divisor * scale;
  }
}

extern "C" __global__ void router_bwd(const float* dweights, i64 dweights_s, const float* logits, i64 logits_s, const int* ids,
                                      i64 ids_s, i64 experts, i64 chosen, i64 sigmoid, i64 renormalise, float scale,
                                      float* dlogits, i64 dlogits_s) {
  extern __shared__ float room[];
  float *scores = room, *dscores = room + experts;
  i64 row = blockIdx.x;
  int count = (int)experts;
  row_scores(logits + row * logits_s, count, sigmoid, scores);
  for (int i = threadIdx.x; i < count; i += 32) dscores[i] = 0.f;
  __syncwarp();
  const int* own = ids + row * ids_s;
  const float* d = dweights + row * dweights_s;
  float total = sigmoid ? SUM_EPS : 0.f, dot = 0.f, spread = 0.f;
  for (i64 j = 0; j < chosen; j++) {
    float score = own[j] >= 0 && own[j] < count ? scores[own[j]] : NAN_F;
    total += score;
    dot += score * d[j];
  }
  for (i64 j = 0; j < chosen; j++) {
    if (own[j] < 0 || own[j] >= count) { spread = NAN_F; continue; }
    float score = scores[own[j]];
    float dscore = scale * (renormalise ? (d[j] - dot / total) / total : d[j]);
    spread += dscore * score;
    if (threadIdx.x == 0) dscores[own[j]] += dscore;
  }
  __syncwarp();
  for (int i = threadIdx.x; i < count; i += 32) {
    float s = scores[i];
    dlogits[row * dlogits_s + i] = sigmoid ? dscores[i] * s * (1.f - s) : s * (dscores[i] - spread);
  }
}

// One block of 1024 threads for each expert: how many copies come before, then its copies' slots.
DEV int expert_of(const int* ids, i64 ids_s, i64 chosen, i64 copy, int experts) {
  int id = ids[copy / chosen * ids_s + copy % chosen];
  return id >= 0 && id < experts ? id : experts - 1;
}
extern "C" __global__ void permute_slots(const int* ids, i64 ids_s, i64 rows, i64 chosen, int* offsets, int* slots, i64 slots_s) {
  __shared__ u64 room[32];
  __shared__ int votes[32];
  int expert = blockIdx.x, experts = gridDim.x;
  i64 copies = rows * chosen;
  u64 less = 0;
  for (i64 i = threadIdx.x; i < copies; i += 1024) less += expert_of(ids, ids_s, chosen, i, experts) < expert;
  int next = (int)block_sum_u64(less, room);
  if (threadIdx.x == 0) {
    offsets[expert] = next;
    if (expert == 0) offsets[experts] = (int)copies;
  }
  for (i64 base = 0; base < copies; base += 1024) {
    i64 i = base + threadIdx.x;
    bool own = i < copies && expert_of(ids, ids_s, chosen, i, experts) == expert;
    u32 vote = __ballot_sync(~0u, own);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __syncthreads();
    if (lane == 0) votes[warp] = __popc(vote);
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < 32; w++) {
      if (w < warp) before += votes[w];
      all += votes[w];
    }
    if (own) slots[i / chosen * slots_s + i % chosen] = next + before + __popc(vote & ((1u << lane) - 1));
    next += all;
  }
}
extern "C" __global__ void permute_rows(const T* x, i64 x_s, const int* slots, i64 slots_s, i64 chosen, T* y, i64 y_s, i64 width) {
  i64 copy = blockIdx.x, row = copy / chosen;
  i64 slot = slots[row * slots_s + copy % chosen];
  for (i64 c = threadIdx.x; c < width; c += blockDim.x) y[slot * y_s + c] = x[row * x_s + c];
}

// y[r] = sum over j of weights[r, j] * x[slots[r, j]]; without weights they are one.
extern "C" __global__ void join(const T* x, i64 x_s, const float* weights, i64 weights_s, const int* slots, i64 slots_s,
                                i64 chosen, T* y, i64 y_s, i64 width) {
  i64 row = blockIdx.x;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
    float sum = 0.f;
    for (i64 j = 0; j < chosen; j++) {
      float v = up(x[slots[row * slots_s + j] * x_s + c]);
      sum = weights ? __fmaf_rn(weights[row * weights_s + j], v, sum) : sum + v;
    }
    put(y + row * y_s + c, sum);
  }
}
extern "C" __global__ void unpermute_bwd(const T* dy, i64 dy_s, const T* x, i64 x_s, const float* weights, i64 weights_s,
                                         const int* slots, i64 slots_s, i64 chosen, T* dx, i64 dx_s, float* dweights,
                                         i64 dweights_s, i64 width) {
  __shared__ float room[8];
  i64 copy = blockIdx.x, row = copy / chosen, j = copy % chosen;
  i64 slot = slots[row * slots_s + j];
  float w = weights[row * weights_s + j], dot = 0.f;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
    float d = up(dy[row * dy_s + c]);
    dot = __fmaf_rn(d, up(x[slot * x_s + c]), dot);
    put(dx + slot * dx_s + c, w * d);
  }
  dot = block_sum(dot, room);
  if (threadIdx.x == 0) dweights[row * dweights_s + j] = dot;
}
