// Drawing the next token. One block of 512 threads for each row.
//
// Probabilities are whole numbers of 2^-40 of the best one, so sums are exact in any order and
// filters can be found by counting digits instead of sorting.

#define TEMPERATURE 0
#define TOP_K 1
#define TOP_P 2
#define MIN_P 3
#define REPETITION 4
#define PRESENCE 5
#define FREQUENCY 6
#define PROMPT 7
#define ONE 1099511627776.0f

// Ascending in the logit; NaN is 0 and below everything.
DEV u32 key_of(float x) {
  if (x != x) return 0;
  if (x == 0.f) x = 0.f;
  u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Drawing {
  const float* logits;
  i64 vocabulary;
  float peak, temperature;
  DEV u64 weight(float logit) const {
    float w = expf((logit - peak) / temperature);
    return w == w ? (u64)(w * ONE) : 0;
  }
};

// Descends digit by digit to the key at which a running sum from the largest key down reaches
// `wanted`: by weight, or by count. Gives the key and what lies above it.
DEV void descend(const Drawing& d, bool by_weight, u64 wanted, u64* histogram, u32* key_out, u64* above_out) {
  __shared__ u32 found;
  __shared__ u64 found_above;
  u32 prefix = 0;
  u64 above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += 512) histogram[i] = 0;
    __syncthreads();
    for (i64 i = threadIdx.x; i < d.vocabulary; i += 512) {
      float logit = d.logits[i];
      u32 key = key_of(logit);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      u64 by = by_weight ? d.weight(logit) : (key != 0);
      if (by) atomicAdd(histogram + (key >> shift & 255), by);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      u64 running = above;
      for (; digit > 0; digit--) {
        if (running + histogram[digit] >= wanted) break;
        running += histogram[digit];
      }
      found = prefix << 8 | digit;
      found_above = running;
    }
    __syncthreads();
    prefix = found;
    above = found_above;
    __syncthreads();
  }
  *key_out = prefix;
  *above_out = above;
}

DEV u32 philox_word(const u32* keys) {
  u32 k0 = keys[0], k1 = keys[1], w0 = keys[2], w1 = keys[3], w2 = 0, w3 = 0;
  for (int round = 0; round < 10; round++) {
    u64 first = (u64)0xD2511F53u * w0, second = (u64)0xCD9E8D57u * w2;
    u32 n0 = (u32)(second >> 32) ^ w1 ^ k0, n2 = (u32)(first >> 32) ^ w3 ^ k1;
    w1 = (u32)second; w3 = (u32)first; w0 = n0; w2 = n2;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  return w0;
}

// Exclusive sum over the block of 512, and the whole.
DEV u64 running_sum(u64 x, u64* room, u64* total) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u64 sum = x;
  for (int o = 1; o < 32; o <<= 1) {
    u64 other = __shfl_up_sync(~0u, sum, o);
    if (lane >= o) sum += other;
  }
  __syncthreads();
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  u64 before = 0, all = 0;
  for (int w = 0; w < 16; w++) {
    if (w < warp) before += room[w];
    all += room[w];
  }
  *total = all;
  return before + sum - x;
}

// What of a token is kept: all above the limit's key, and the first `ties` of those that equal it.
struct Limit { u32 key; u64 ties; };

// The first token at which the running sum of kept weights exceeds `wanted`; wanted = ~0 only sums.
DEV i64 walk(const Drawing& d, Limit limit, u64 least, u64 wanted, u64* room, u64* total) {
  __shared__ i64 drawn;
  if (threadIdx.x == 0) drawn = -1;
  u64 sum = 0, ties = 0;
  for (i64 base = 0; base < d.vocabulary; base += 512) {
    i64 i = base + threadIdx.x;
    bool inside = i < d.vocabulary;
    u32 key = inside ? key_of(d.logits[i]) : 0;
    u64 equals, all;
    u64 rank = ties + running_sum(inside && key == limit.key, room, &equals);
    ties += equals;
    bool kept = inside && key != 0 && (key > limit.key || (key == limit.key && rank < limit.ties));
    u64 weight = kept ? d.weight(d.logits[i]) : 0;
    if (weight < least) weight = 0;
    u64 before = sum + running_sum(weight, room, &all);
    if (weight && before <= wanted && before + weight > wanted) drawn = i;
    sum += all;
    __syncthreads();
    if (drawn >= 0) break;
  }
  *total = sum;
  return drawn;
}

DEV Limit top_k(const Drawing& d, u64 count, u64* histogram) {
  u32 key;
  u64 above;
  descend(d, false, count, histogram, &key, &above);
  return Limit{key, count - above};
}

DEV void penalise(float* own, i64 vocabulary, const int* history, i64 longest, const float* s) {
  i64 prompt = (i64)s[PROMPT];
  for (i64 i = threadIdx.x; i < longest; i += 512) {
    int id = history[i];
    if (id < 0 || id >= vocabulary) continue;
    bool first = true;
    for (i64 j = 0; j < i && first; j++) first = history[j] != id;
    if (!first) continue;
    int count = 0;
    for (i64 j = i; j < longest; j++) count += j >= prompt && history[j] == id;
    float logit = own[id];
    logit = logit > 0.f ? logit / s[REPETITION] : logit * s[REPETITION];
    if (count) logit -= s[PRESENCE] + s[FREQUENCY] * (float)count;
    own[id] = logit;
  }
}

extern "C" __global__ void __launch_bounds__(512)
sample(const float* logits, i64 logits_s, i64 padded, const float* bias, i64 bias_s, const int* history, i64 history_s,
       i64 longest, const float* settings, i64 settings_s, const u32* keys, i64 keys_s, i64 vocabulary, float* work,
       int* token, float* logprob) {
  __shared__ float room[16];
  __shared__ u64 wide[256];
  __shared__ u64 sums[16];
  __shared__ int largest;
  i64 row = blockIdx.x;
  const float *raw = logits + row * logits_s, *s = settings + row * settings_s;
  float* own = work + row * vocabulary;
  for (i64 i = threadIdx.x; i < vocabulary; i += 512) own[i] = raw[i];
  if (threadIdx.x == 0) largest = 0x7fffffff;
  __syncthreads();
  if (history) penalise(own, vocabulary, history + row * history_s, longest, s);
  __syncthreads();
  if (bias)
    for (i64 i = threadIdx.x; i < vocabulary; i += 512) own[i] += bias[row * bias_s + i];
  __syncthreads();
  float peak = -INF;
  int finite = 0;
  for (i64 i = threadIdx.x; i < vocabulary; i += 512) {
    peak = fmaxf(peak, own[i]);
    finite |= fabsf(own[i]) < INF;
  }
  peak = block_max(peak, room);
  if (!__syncthreads_or(finite)) {
    if (threadIdx.x == 0) { token[row] = -1; logprob[row] = NAN_F; }
    return;
  }
  for (i64 i = threadIdx.x; i < vocabulary; i += 512)
    if (own[i] == peak) { atomicMin(&largest, (int)i); break; }
  __syncthreads();
  i64 drawn = largest;
  if (s[TEMPERATURE] != 0.f) {
    Drawing d = {own, vocabulary, peak, s[TEMPERATURE]};
    Limit all = {1, 0}, limit = all;
    all.ties = limit.ties = (u64)vocabulary;
    i64 k = (i64)s[TOP_K];
    if (k > 0 && k < vocabulary) limit = top_k(d, (u64)k, wide);
    u64 total;
    if (s[TOP_P] < 1.f) {
      walk(d, limit, 0, ~0ull, sums, &total);
      // Kept while the sum before it is below top_p of the total, the first one always.
      u64 wanted = (u64)((double)s[TOP_P] * (double)total), above;
      u32 key;
      if (wanted == 0) wanted = 1;
      descend(d, true, wanted, wide, &key, &above);
      u32 bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
      u64 each = key ? d.weight(__uint_as_float(bits)) : 0;
      u64 ties = each ? (wanted - above + each - 1) / each : 1;
      if (key > limit.key || (key == limit.key && ties < limit.ties)) limit = Limit{key, ties};
    }
    u64 least = (u64)(s[MIN_P] * ONE);
    walk(d, limit, least, ~0ull, sums, &total);
    u64 u = philox_word(keys + row * keys_s) >> 8;
    u64 wanted = (total >> 24) * u + ((total & 0xffffff) * u >> 24);
    i64 found = walk(d, limit, least, wanted, sums, &total);
    if (found >= 0) drawn = found;
  }
  RowSums r = row_sums(raw, padded, 1.f, room);
  if (threadIdx.x == 0) {
    token[row] = (int)drawn;
    logprob[row] = row_log_prob(raw, padded, (int)drawn, 1.f, row_lse(r, 1.f));
  }
}
