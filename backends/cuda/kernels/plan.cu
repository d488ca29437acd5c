// Lists of tiles over rows that are divided where only the device knows: groups, documents,
// sequences. One block of 1024 threads; entries of four integers, the first -1 where there is none.

// Exclusive prefix sum over a block of 1024.
DEV int prefix(int x, int* room, int* total) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, sum = x;
  for (int o = 1; o < 32; o <<= 1) {
    int other = __shfl_up_sync(~0u, sum, o);
    if (lane >= o) sum += other;
  }
  __syncthreads();
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < 32; w++) {
    if (w < warp) before += room[w];
    all += room[w];
  }
  *total = all;
  return before + sum - x;
}

// Part p holds rows starts[p]..starts[p+1]. Entry: part, first row, the part's end, position of
// the first row in its sequence. `lengths`: what the sequence holds in all, its rows being the last.
extern "C" __global__ void plan_tiles(const int* starts, i64 parts, const int* lengths, i64 tile, int* plan, i64 entries) {
  __shared__ int room[32];
  for (i64 i = threadIdx.x; i < entries; i += 1024) plan[4 * i] = -1;
  __syncthreads();
  int done = 0;
  for (i64 base = 0; base < parts; base += 1024) {
    i64 p = base + threadIdx.x;
    int start = p < parts ? starts[p] : 0, end = p < parts ? starts[p + 1] : 0;
    int count = end > start ? (int)((end - start + tile - 1) / tile) : 0, total;
    int at = done + prefix(count, room, &total);
    int offset = p < parts && lengths ? lengths[p] - (end - start) : 0;
    for (int i = 0; i < count; i++) {
      if (at + i >= entries) break;
      int* to = plan + 4 * (i64)(at + i);
      int first = start + i * (int)tile;
      to[0] = (int)p; to[1] = first; to[2] = end; to[3] = offset + first - start;
    }
    done += total;
    __syncthreads();
  }
}
