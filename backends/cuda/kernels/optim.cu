// Optimisers and the reductions around them, in f32. T is the storage type of what is summed or of
// the rounded copy. Hyper-parameters are read on the device: the host rewrites them every step.

#define LR 0
#define BETA1 1
#define BETA2 2
#define EPS 3
#define DECAY 4
#define BIAS1 5
#define BIAS2 6
#define GRAD_SCALE 7

extern "C" __global__ void adamw(float* weight, const float* grad, float* m, float* v, T* compute, const float* hyper, i64 n) {
  i64 i = INDEX;
  if (i >= n) return;
  float b1 = hyper[BETA1], b2 = hyper[BETA2], lr = hyper[LR];
  float g = hyper[GRAD_SCALE] * grad[i];
  float m1 = b1 * m[i] + (1.f - b1) * g;
  float v1 = b2 * v[i] + (1.f - b2) * g * g;
  m[i] = m1;
  v[i] = v1;
  float update = lr * (m1 / hyper[BIAS1]) / (sqrtf(v1 / hyper[BIAS2]) + hyper[EPS]);
  float w = weight[i] * (1.f - lr * hyper[DECAY]) - update;
  weight[i] = w;
  if (compute) put(compute + i, w);
}

// One block of 256 threads for 4096 elements.
extern "C" __global__ void square_blocks(const T* x, float* partial, i64 n) {
  __shared__ float room[8];
  i64 first = (i64)blockIdx.x * 4096;
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < 16; j++) {
    i64 i = first + j * 256 + threadIdx.x;
    float v = i < n ? up(x[i]) : 0.f;
    sum = __fmaf_rn(v, v, sum);
  }
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The tree that splits at the largest power of two: neighbours first. One block.
extern "C" __global__ void tree_sum(float* partial, float* y, i64 n) {
  for (i64 step = 1; step < n; step *= 2) {
    for (i64 i = 2 * step * threadIdx.x; i + step < n; i += 2 * step * blockDim.x) partial[i] += partial[i + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) *y = n > 0 ? partial[0] : 0.f;
}

template <class S> DEV void reduce_tree(const T* x, i64 parts, i64 part_s, S* y, const Dims& dims, i64 n, i64 add) {
  i64 i = INDEX;
  if (i >= n) return;
  i64 o[3];
  places(dims, (u32)i, o);
  float stack[24];
  for (i64 part = 0; part < parts; part++) {
    float value = up(x[part * part_s + o[0]]);
    int level = 0;
    for (; part >> level & 1; level++) value = stack[level] + value;
    stack[level] = value;
  }
  float sum = 0.f;
  bool any = false;
  for (int level = 0; parts >> level; level++)
    if (parts >> level & 1) {
      sum = any ? stack[level] + sum : stack[level];
      any = true;
    }
  put(y + o[1], add ? up(y[o[1]]) + sum : sum);
}
extern "C" __global__ void reduce_tree_f32(const T* x, i64 parts, i64 part_s, float* y, Dims dims, i64 n, i64 add) {
  reduce_tree(x, parts, part_s, y, dims, n, add);
}
extern "C" __global__ void reduce_tree_same(const T* x, i64 parts, i64 part_s, T* y, Dims dims, i64 n, i64 add) {
  reduce_tree(x, parts, part_s, y, dims, n, add);
}

extern "C" __global__ void muon_momentum(const float* grad, float* momentum, float* u, const float* hyper, i64 n) {
  i64 i = INDEX;
  if (i >= n) return;
  float b1 = hyper[BETA1], g = hyper[GRAD_SCALE] * grad[i];
  float m = b1 * momentum[i] + (1.f - b1) * g;
  momentum[i] = m;
  u[i] = (1.f - b1) * g + b1 * m;
}
extern "C" __global__ void muon_unit(float* u, const float* squares, float eps, i64 n) {
  i64 i = INDEX;
  if (i < n) u[i] = u[i] / (sqrtf(*squares) + eps);
}
extern "C" __global__ void muon_combine(float* y, float a, const float* x, float b, i64 n) {
  i64 i = INDEX;
  if (i < n) y[i] = a * y[i] + b * x[i];
}
extern "C" __global__ void muon_apply(float* weight, const float* o, T* compute, const float* hyper, float factor, i64 n) {
  i64 i = INDEX;
  if (i >= n) return;
  float lr = hyper[LR];
  float w = weight[i] * (1.f - lr * hyper[DECAY]) - lr * factor * o[i];
  weight[i] = w;
  if (compute) put(compute + i, w);
}
