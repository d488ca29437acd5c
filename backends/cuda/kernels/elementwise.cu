// Moving, converting and combining elements; gates; positions; embedding; the paged cache's writes.

template <class S> DEV void copy(const S* src, S* dst, const Dims& dims, i64 n) {
  i64 i = INDEX;
  if (i >= n) return;
  i64 o[3];
  places(dims, (u32)i, o);
  dst[o[1]] = src[o[0]];
}
extern "C" __global__ void copy_1(const u8* src, u8* dst, Dims dims, i64 n) { copy(src, dst, dims, n); }
extern "C" __global__ void copy_2(const u16* src, u16* dst, Dims dims, i64 n) { copy(src, dst, dims, n); }
extern "C" __global__ void copy_4(const u32* src, u32* dst, Dims dims, i64 n) { copy(src, dst, dims, n); }

template <class S> DEV void fill(S* dst, S value, const Dims& dims, i64 n) {
  i64 i = INDEX;
  if (i >= n) return;
  i64 o[3];
  places(dims, (u32)i, o);
  dst[o[0]] = value;
}
extern "C" __global__ void fill_f32(u32* dst, float value, Dims dims, i64 n) { fill(dst, __float_as_uint(value), dims, n); }
extern "C" __global__ void fill_i32(int* dst, float value, Dims dims, i64 n) { fill(dst, __float2int_rn(value), dims, n); }
extern "C" __global__ void fill_bf16(bf16* dst, float value, Dims dims, i64 n) { bf16 v; put(&v, value); fill(dst, v, dims, n); }
extern "C" __global__ void fill_f16(f16* dst, float value, Dims dims, i64 n) { f16 v; put(&v, value); fill(dst, v, dims, n); }

extern "C" __global__ void add(const T* a, const T* b, T* y, Dims dims, i64 n) {
  i64 i = INDEX;
  if (i >= n) return;
  i64 o[3];
  places(dims, (u32)i, o);
  put(y + o[2], up(a[o[0]]) + up(b[o[1]]));
}

extern "C" __global__ void add_flat(const T* a, const T* b, T* y, i64 n) {
  i64 i = INDEX;
  if (i < n) put(y + i, up(a[i]) + up(b[i]));
}

extern "C" __global__ void scale(const T* x, float factor, T* y, i64 n) {
  i64 i = INDEX;
  if (i < n) put(y + i, factor * up(x[i]));
}

extern "C" __global__ void cast_f32(const T* x, float* y, i64 n) { i64 i = INDEX; if (i < n) put(y + i, up(x[i])); }
extern "C" __global__ void cast_bf16(const T* x, bf16* y, i64 n) { i64 i = INDEX; if (i < n) put(y + i, up(x[i])); }
extern "C" __global__ void cast_f16(const T* x, f16* y, i64 n) { i64 i = INDEX; if (i < n) put(y + i, up(x[i])); }

DEV float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

extern "C" __global__ void swiglu(const T* gate, i64 gate_s, const T* up_, i64 up_s, T* y, i64 y_s, i64 rows, i64 width) {
  i64 i = INDEX;
  if (i >= rows * width) return;
  i64 r = (u32)i / (u32)width, c = (u32)i % (u32)width;
  float g = up(gate[r * gate_s + c]);
  put(y + r * y_s + c, rounded<T>(g * sigmoid(g)) * up(up_[r * up_s + c]));
}

extern "C" __global__ void swiglu_bwd(const T* dy, i64 dy_s, const T* gate, i64 gate_s, const T* up_, i64 up_s,
                                      T* dgate, i64 dgate_s, T* dup, i64 dup_s, i64 rows, i64 width) {
  i64 i = INDEX;
  if (i >= rows * width) return;
  i64 r = (u32)i / (u32)width, c = (u32)i % (u32)width;
  float d = up(dy[r * dy_s + c]), g = up(gate[r * gate_s + c]), u = up(up_[r * up_s + c]);
  float s = sigmoid(g);
  put(dgate + r * dgate_s + c, d * u * s * (1.f + g * (1.f - s)));
  put(dup + r * dup_s + c, d * (g * s));
}

// style 0: element i with i + width/2; 1: element 2i with 2i + 1. sign -1 rotates back.
extern "C" __global__ void rope(const T* x, i64 x_row, i64 x_head, T* y, i64 y_row, i64 y_head, const int* positions,
                                const float* cosines, const float* sines, i64 longest, float sign, i64 style,
                                i64 rows, i64 heads, i64 half) {
  i64 i = INDEX;
  if (i >= rows * heads * half) return;
  u32 pair = (u32)i % (u32)half, rest = (u32)i / (u32)half;
  u32 head = rest % (u32)heads, row = rest / (u32)heads;
  i64 first = style ? 2 * pair : pair, second = style ? 2 * pair + 1 : pair + half;
  int position = positions[row];
  float c = NAN_F, s = NAN_F;
  if (position >= 0 && position < longest) {
    c = cosines[position * half + pair];
    s = sign * sines[position * half + pair];
  }
  const T* from = x + row * x_row + head * x_head;
  T* to = y + row * y_row + head * y_head;
  float u = up(from[first]), w = up(from[second]);
  put(to + first, u * c - w * s);
  put(to + second, w * c + u * s);
}

extern "C" __global__ void embed(const int* ids, const T* table, T* y, i64 y_s, i64 vocabulary, i64 width) {
  i64 row = blockIdx.x;
  int id = ids[row];
  bool known = id >= 0 && id < vocabulary;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
    if (known) y[row * y_s + c] = table[id * width + c];
    else put(y + row * y_s + c, NAN_F);
  }
}

// The block of an id's first row adds all its rows, in ascending order; others leave at once.
#define EMBED_COLUMNS 4
extern "C" __global__ void embed_bwd(const int* ids, const T* dy, i64 dy_s, float* dtable, i64 rows, i64 vocabulary,
                                     i64 width, i64 add) {
  __shared__ u32 hits[8];
  i64 row = blockIdx.x;
  int id = ids[row];
  if (id < 0 || id >= vocabulary) return;
  int earlier = 0;
  for (i64 r = threadIdx.x; r < row; r += 256) earlier |= ids[r] == id;
  if (__syncthreads_or(earlier)) return;
  i64 column = blockIdx.y * 256 * EMBED_COLUMNS + threadIdx.x;
  float sum[EMBED_COLUMNS] = {};
  for (i64 base = row; base < rows; base += 256) {
    i64 r = base + threadIdx.x;
    u32 vote = __ballot_sync(~0u, r < rows && ids[r] == id);
    if ((threadIdx.x & 31) == 0) hits[threadIdx.x >> 5] = vote;
    __syncthreads();
    for (int w = 0; w < 8; w++)
      for (u32 left = hits[w]; left; left &= left - 1) {
        const T* from = dy + (base + w * 32 + __ffs(left) - 1) * dy_s;
#pragma unroll
        for (int j = 0; j < EMBED_COLUMNS; j++)
          if (column + j * 256 < width) sum[j] += up(from[column + j * 256]);
      }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < EMBED_COLUMNS; j++)
    if (column + j * 256 < width) {
      float* to = dtable + id * width + column + j * 256;
      *to = add ? *to + sum[j] : sum[j];
    }
}

extern "C" __global__ void kv_write(const T* x, i64 x_row, i64 x_head, const int* slots, T* cache, i64 slots_count,
                                    i64 heads, i64 width) {
  i64 row = blockIdx.x;
  i64 slot = slots[row];
  if (slot < 0 || slot >= slots_count) return;
  for (i64 i = threadIdx.x; i < heads * width; i += blockDim.x)
    cache[slot * heads * width + i] = x[row * x_row + i / width * x_head + i % width];
}

// delta[row, head] = sum of dout * out. A warp for each.
extern "C" __global__ void attention_delta(const T* out, i64 out_row, i64 out_head, const T* dout, i64 dout_row,
                                           i64 dout_head, float* delta, i64 rows, i64 heads,
                                           i64 width) {
  i64 index = INDEX / 32;
  if (index >= rows * heads) return;
  i64 row = index / heads, head = index % heads;
  const T *o = out + row * out_row + head * out_head, *d = dout + row * dout_row + head * dout_head;
  float sum = 0.f;
  for (int c = threadIdx.x % 32; c < width; c += 32) sum = __fmaf_rn(up(o[c]), up(d[c]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[index] = sum;
}
