// How the threads of a block share the loads of an operand's tiles, for the matrix products. A
// product's own file says where in a tile an element lies.

template <int PITCH> DEV int place_in_tile(int r, int c);

// A thread's share of an operand's tiles: where its pieces of eight elements lie now. K runs along a
// row (ALONG) or down the rows.
template <int ROWS, int WIDTH, int PITCH, bool ALONG, int KSTEP, int TEAM> struct Share {
  static const int COUNT = (ROWS * WIDTH / 8 + TEAM - 1) / TEAM;
  const T* from[COUNT];
  const T* anywhere;
  i64 step_s;
  int count[COUNT];

  // `first` row or column of the operand's `limit`; k begins at k0.
  DEV void begin(const T* base, i64 stride, i64 first, i64 limit, i64 k0) {
    anywhere = base;
    step_s = ALONG ? KSTEP : KSTEP * stride;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      int r = place(i) / (WIDTH / 8), c = place(i) % (WIDTH / 8) * 8;
      i64 left = limit - first - (ALONG ? r : c);
      count[i] = left <= 0 || r >= ROWS ? 0 : ALONG || left > 8 ? 8 : (int)left;
      from[i] = ALONG ? base + (first + r) * stride + k0 + c : base + (k0 + r) * stride + first + c;
    }
  }
  DEV static int place(int i) { return threadIdx.x + i * TEAM; }

  // The next step's tile, of which `left` elements of k exist.
  DEV void load(u16* tile, int left, bool whole) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      int r = place(i) / (WIDTH / 8), c = place(i) % (WIDTH / 8) * 8;
      if (ROWS * WIDTH / 8 % TEAM && r >= ROWS) break;
      int n = count[i];
      if (ALONG) n = left - c < n ? (left - c < 0 ? 0 : left - c) : n;
      else n = r < left ? n : 0;
      load_eight(tile + place_in_tile<PITCH>(r, c), from[i], anywhere, n, whole);
      from[i] += step_s;
    }
  }
};
