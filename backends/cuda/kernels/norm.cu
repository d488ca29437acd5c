// Root-mean-square normalisation, its gradients, and reductions over rows.
//
// A row is taken by blockDim.x threads (32 or 256, by the width alone); a block takes blockDim.y.

DEV float row_sum(float x, float* room) {
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
  __syncthreads();
  float all = 0.f;
  for (int w = 0; w < 8; w++) all = __fadd_rn(all, room[w]);
  return all;
}

// With a residual: sum = x + residual, rounded, is what is normalised.
extern "C" __global__ void rms_norm(const T* x, i64 x_s, const T* residual, i64 residual_s, T* sum, i64 sum_s,
                                    const T* weight, float eps, T* y, i64 y_s, float* rstd, i64 rows, i64 width) {
  __shared__ float room[8];
  i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const T* from = x + row * x_s;
  float squares = 0.f;
  if (residual) {
    T* to = sum + row * sum_s;
    for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
      put(to + c, up(from[c]) + up(residual[row * residual_s + c]));
      float v = up(to[c]);
      squares = __fmaf_rn(v, v, squares);
    }
    from = to;
  } else {
    for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
      float v = up(from[c]);
      squares = __fmaf_rn(v, v, squares);
    }
  }
  squares = row_sum(squares, room);
  float r = 1.f / sqrtf(squares / (float)width + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x)
    put(y + row * y_s + c, rounded<T>(__fmul_rn(up(from[c]), r)) * up(weight[c]));
}

extern "C" __global__ void rms_norm_bwd(const T* dy, i64 dy_s, const T* dsum, i64 dsum_s, const T* x, i64 x_s,
                                        const T* weight, const float* rstd, T* dx, i64 dx_s, i64 rows, i64 width) {
  __shared__ float room[8];
  i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const T *d = dy + row * dy_s, *own = x + row * x_s;
  float r = rstd[row], mean = 0.f;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x)
    mean = __fmaf_rn(up(d[c]) * up(weight[c]), up(own[c]) * r, mean);
  mean = row_sum(mean, room) / (float)width;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
    float g = up(d[c]) * up(weight[c]), n = up(own[c]) * r;
    float value = r * (g - n * mean);
    if (dsum) value += up(dsum[row * dsum_s + c]);
    put(dx + row * dx_s + c, value);
  }
}

// partial[block, column] = sum over the block's 64 rows of dy * x * rstd. Blocks of 32 x 8 threads.
extern "C" __global__ void dweight_blocks(const T* dy, i64 dy_s, const T* x, i64 x_s, const float* rstd, float* partial,
                                          i64 rows, i64 width) {
  __shared__ float room[8][33];
  i64 column = blockIdx.y * 32 + threadIdx.x, first = (i64)blockIdx.x * 64;
  float sum = 0.f;
  if (column < width)
    for (i64 r = first + threadIdx.y; r < first + 64 && r < rows; r += 8)
      sum = __fmaf_rn(up(dy[r * dy_s + column]), up(x[r * x_s + column]) * rstd[r], sum);
  room[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
  for (int w = 1; w < 8; w++) sum += room[w][threadIdx.x];
  partial[blockIdx.x * width + column] = sum;
}

extern "C" __global__ void sum_blocks(const float* partial, float* to, i64 blocks, i64 width, i64 add) {
  i64 column = INDEX;
  if (column >= width) return;
  float sum = 0.f;
#pragma unroll 8
  for (i64 b = 0; b < blocks; b++) sum += partial[b * width + column];
  to[column] = add ? to[column] + sum : sum;
}
