#!/usr/bin/env python3
"""Times PyTorch's products and attention at the sizes of `op_bench`'s, one JSON object a line.

    cargo run --release -p pontoon-cuda --example op_bench
    python benches/torch_operations.py
"""

import json
import time

import torch

torch.backends.cuda.matmul.allow_tf32 = False


def seconds(work, times: int = 20) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def main() -> None:
    for dtype, n in ((torch.bfloat16, 4096), (torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        taken = seconds(lambda: a @ b.T)
        print(json.dumps({"torch": "matmul", "n": n, "dtype": str(dtype), "us": round(taken * 1e6, 1),
                          "tflops": round(2 * n**3 / taken / 1e12, 1)}))
    q, k, v = (torch.randn(1, 16, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    print(json.dumps({"torch": "attention 512x16x64", "us": round(seconds(attend) * 1e6, 1)}))
    out = attend()
    upstream = torch.randn_like(out)
    taken = seconds(lambda: out.backward(upstream, retain_graph=True))
    print(json.dumps({"torch": "attention bwd 512x16x64", "us": round(taken * 1e6, 1)}))


if __name__ == "__main__":
    main()
