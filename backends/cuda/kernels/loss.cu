// Losses and log-probabilities over rows of f32 logits. Blocks of 512 threads, one for each row.

// Mode 0: first = loss, second = lse. Mode 1: first = log p, second = entropy. `lse` always.
extern "C" __global__ void row_losses(const float* logits, i64 stride, i64 vocabulary, const int* targets, float sharpness,
                                      float* first, float* second, float* lse_out, i64 mode) {
  __shared__ float room[16];
  i64 row = blockIdx.x;
  const float* own = logits + row * stride;
  RowSums s = row_sums(own, vocabulary, sharpness, room);
  if (threadIdx.x) return;
  float lse = row_lse(s, sharpness);
  float log_p = row_log_prob(own, vocabulary, targets[row], sharpness, lse);
  if (lse_out) lse_out[row] = lse;
  if (first) first[row] = mode ? log_p : -log_p;
  if (second) second[row] = mode ? logf(s.total) - s.weighted / s.total : lse;
}

// dlogits = factor * (softmax - onehot), rounded; an ignored row is zero, an unknown target NaN.
extern "C" __global__ void logit_gradients(const float* logits, i64 stride, i64 vocabulary, const int* targets,
                                           float sharpness, const float* lse, const float* upstream, float sign, T* dlogits) {
  i64 row = blockIdx.x;
  int target = targets[row];
  float l = lse[row], factor = sign * upstream[row] * sharpness;
  bool known = target >= 0 && target < vocabulary;
  for (i64 i = threadIdx.x; i < stride; i += blockDim.x) {
    float value = 0.f;
    if (i < vocabulary && target != IGNORED) {
      float p = expf(__fmaf_rn(logits[row * stride + i], sharpness, -l));
      value = known ? factor * (p - (i == target ? 1.f : 0.f)) : NAN_F;
    }
    put(dlogits + row * stride + i, value);
  }
}
