// Tiles in shared memory and the tensor cores' steps, for storage types of 16 bits.
//
// A step is m16n8k16. Lane l holds of the first operand rows l/4 and l/4 + 8, of the second column
// l/4, of the result columns 2 (l % 4) and the next one.

DEV u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void copy_16(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

// Eight elements of a row, of which `count` exist, into shared memory; the rest is zero.
DEV void load_eight(u16* to, const T* from, const T* anywhere, int count, bool whole) {
  if (whole) {
    copy_16(shared_at(to), count ? from : anywhere, 2 * count);
    return;
  }
  u32 words[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 low = 2 * j < count ? from[2 * j].bits : 0, high = 2 * j + 1 < count ? from[2 * j + 1].bits : 0;
    words[j] = low | high << 16;
  }
  *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
}

DEV void matrices(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEV void matrices_turned(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEV void multiply(float* c, const u32* a, const u32* b) {
#if DT == 1
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
