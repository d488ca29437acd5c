// Word sums and digests of memory, where it lies.

// Each run of bytes as little-endian words, the last one filled up with zeros; modulo 2^32, so any
// order gives the same sum. Grid: x over runs' pieces, y over views.
struct Run { u64 address; i64 bytes, count, step; };
struct Runs { Run runs[16]; };
extern "C" __global__ void word_sums(Runs all_runs, u32* sums) {
  __shared__ u64 room[8];
  Run run = all_runs.runs[blockIdx.y];
  i64 words = (run.bytes + 3) / 4, all = words * run.count;
  u32 sum = 0;
  for (i64 i = INDEX; i < all; i += (i64)gridDim.x * blockDim.x) {
    i64 r = run.count == 1 ? 0 : i / words, w = i - r * words;
    u64 at = run.address + r * run.step + 4 * w;
    i64 left = run.bytes - 4 * w;
    if (left >= 4 && (at & 3) == 0) sum += *(const u32*)at;
    else
      for (int b = 0; b < 4 && b < left; b++) sum += (u32) * (const u8*)(at + b) << (8 * b);
  }
  u64 total = block_sum_u64(sum, room);
  if (threadIdx.x == 0 && (u32)total) atomicAdd(sums + blockIdx.y, (u32)total);
}

#define FACTOR 0x9E3779B97F4A7C15ull
DEV u64 word_at(u64 at, i64 bytes) {
  if (bytes >= 8 && (at & 7) == 0) return *(const u64*)at;
  u64 word = 0;
  for (int b = 0; b < 8 && b < bytes; b++) word |= (u64) * (const u8*)(at + b) << (8 * b);
  return word;
}
// A block of memory to a warp, a lane to a thread.
extern "C" __global__ void digests(u64 address, i64 bytes, i64 block, u64* to) {
  i64 index = blockIdx.x;
  int lane = threadIdx.x;
  i64 first = index * block, size = bytes - first < block ? bytes - first : block;
  u64 state = FACTOR * (2 * lane + 1);
  u64 at = address + first;
#pragma unroll 8
  for (i64 word = lane; word * 8 < size; word += 32) {
    state = (state ^ word_at(at + 8 * word, size - 8 * word)) * FACTOR;
    state = state << 29 | state >> 35;
  }
  u64 hash = (u64)size;
  for (int l = 0; l < 32; l++) {
    u64 other = __shfl_sync(~0u, state, l);
    u64 mixed = (hash ^ other) * FACTOR;
    hash = mixed ^ mixed >> 32;
  }
  if (lane == 0) to[index] = hash;
}
