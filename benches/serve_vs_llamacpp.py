#!/usr/bin/env python3
"""Serves the same random model with Pontoon and with llama.cpp, in turns, and prints ratios.

Measured, greedy, two threads each: one stream's decode tokens/s, a 512-token prompt's tokens/s, and the tokens/s of 16
and 64 streams together. Pontoon is asked over HTTP, llama.cpp through its C interface with as many sequences in one
batch, which spares it HTTP and scheduling. Weights: bf16 against BF16, int8 (8.5 bits) against Q8_0 (8.5 bits).

    cargo build --release
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf numpy safetensors
    python benches/serve_vs_llamacpp.py --make /tmp/models                      # writes the random models once
    python benches/serve_vs_llamacpp.py --models /tmp/models --size 30m --out benches/results/DATE-serve-30m.json
"""

import argparse
import http.client
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2
PROMPT, DECODE = 512, 64
SIZES = {
    "30m": dict(vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
                head_dim=64, intermediate_size=1376),
    "0.5b": dict(vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, head_dim=64, intermediate_size=4864),
}
FORMATS = {"bf16": "BF16", "int8": "Q8_0"}


def tensors(config):
    """Name on disk, name in GGUF, shape."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", "token_embd.weight", (config["vocab_size"], width)
    yield "model.norm.weight", "output_norm.weight", (width,)
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs, shape in [
            ("input_layernorm", "attn_norm", (width,)),
            ("self_attn.q_proj", "attn_q", (queries, width)),
            ("self_attn.k_proj", "attn_k", (keys, width)),
            ("self_attn.v_proj", "attn_v", (keys, width)),
            ("self_attn.o_proj", "attn_output", (width, queries)),
            ("post_attention_layernorm", "ffn_norm", (width,)),
            ("mlp.gate_proj", "ffn_gate", (inner, width)),
            ("mlp.up_proj", "ffn_up", (inner, width)),
            ("mlp.down_proj", "ffn_down", (width, inner)),
        ]:
            yield f"model.layers.{layer}.{ours}.weight", f"blk.{layer}.{theirs}.weight", shape


def make(folder: Path, size: str):
    import gguf
    import numpy as np

    config = SIZES[size]
    own = folder / size
    own.mkdir(parents=True, exist_ok=True)
    hf = dict(config, model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", rms_norm_eps=1e-5,
              tie_word_embeddings=True, max_position_embeddings=4096, rope_theta=10000.0, torch_dtype="bfloat16",
              bos_token_id=1, eos_token_id=2, attention_bias=False, mlp_bias=False)
    (own / "config.json").write_text(json.dumps(hf, indent=1))
    tokenizer = ROOT / "tests/golden/data/tokenizer/tokenizer.json"
    (own / "tokenizer.json").write_text(tokenizer.read_text())
    writers = {}
    for ours, theirs in FORMATS.items():
        writer = gguf.GGUFWriter(own / f"{theirs}.gguf", "llama")
        writer.add_context_length(4096)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("no_vocab")
        writers[theirs] = writer
    random = np.random.default_rng(1)
    header, blobs, at = {}, [], 0
    for ours, theirs, shape in tensors(config):
        values = np.ones(shape, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32) * 0.02
        half = ((values.view(np.uint32) + 0x7FFF + ((values.view(np.uint32) >> 16) & 1)) >> 16).astype(np.uint16)
        blob = half.tobytes()
        header[ours] = dict(dtype="BF16", shape=list(shape), data_offsets=[at, at + len(blob)])
        at += len(blob)
        blobs.append(blob)
        values = (half.astype(np.uint32) << 16).view(np.float32)
        for kind, writer in writers.items():
            if len(shape) == 1:
                writer.add_tensor(theirs, values)
            else:
                dtype = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(theirs, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    text = json.dumps(header).encode()
    with open(own / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)
    for writer in writers.values():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def prompt(stream: int, count: int):
    return [3 + (stream * 7919 + at * 104729) % 290 for at in range(count)]


class Pontoon:
    """A server, asked over HTTP."""

    def __init__(self, folder: Path, weights: str, port: int):
        command = [ROOT / "target/release/pontoon", "serve", folder, "--port", str(port), "--context", "1024",
                   "--sequences", "64", "--cache-tokens", "49152", "--weights", weights, "--device",
                   f"cpu:threads={THREADS}", "--name", "m"]
        self.port = port
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if "listening" in line:
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, tokens, count, stream=False):
        """Completion tokens, and when each came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = dict(model="m", prompt=tokens, max_tokens=count, temperature=0, ignore_eos=True, stream=stream)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer, times = connection.getresponse(), []
        assert answer.status == 200, answer.read()
        if not stream:
            return json.loads(answer.read())["usage"]["completion_tokens"], times
        while line := answer.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
        return len(times), times

    def prefill(self, salt):
        begin = time.perf_counter()
        self.ask(prompt(salt, PROMPT), 1)
        return PROMPT / (time.perf_counter() - begin)

    def decode(self, salt, streams):
        """Tokens a second from the first token of the last stream to the end of the first."""
        times = [None] * streams

        def one(index):
            times[index] = self.ask(prompt(salt + index, 8), DECODE, stream=True)[1]

        threads = [threading.Thread(target=one, args=(index,)) for index in range(streams)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        first, last = max(own[0] for own in times), min(own[-1] for own in times)
        inside = sum(first < at <= last for own in times for at in own)
        return inside / (last - first)

    def close(self):
        self.process.terminate()
        self.process.wait()


class LlamaCpp:
    """The library, with all sequences in one batch."""

    def __init__(self, path: Path):
        import llama_cpp

        self.lib = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.silent = silent
        llama_cpp.llama_log_set(silent, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"cannot load {path}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 49152, 512, 512, 64
        options.n_threads = options.n_threads_batch = THREADS
        if hasattr(options, "kv_unified"):
            options.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context, "cannot make a context"
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        self.sampler = chain

    def run(self, rows):
        """rows of (token, position, sequence, wants logits)"""
        batch = self.batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wants) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wants
        assert self.lib.llama_decode(self.context, batch) == 0

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def prefill(self, salt):
        self.clear()
        tokens = prompt(salt, PROMPT)
        begin = time.perf_counter()
        self.run([(token, at, 0, at == PROMPT - 1) for at, token in enumerate(tokens)])
        self.lib.llama_sampler_sample(self.sampler, self.context, PROMPT - 1)
        return PROMPT / (time.perf_counter() - begin)

    def decode(self, salt, streams):
        self.clear()
        last = []
        for stream in range(streams):
            tokens = prompt(salt + stream, 8)
            self.run([(token, at, stream, at == 7) for at, token in enumerate(tokens)])
            last.append(self.lib.llama_sampler_sample(self.sampler, self.context, 7))
        begin = time.perf_counter()
        for step in range(DECODE - 1):
            self.run([(token, 8 + step, stream, True) for stream, token in enumerate(last)])
            last = [self.lib.llama_sampler_sample(self.sampler, self.context, row) for row in range(streams)]
        return streams * (DECODE - 1) / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--format", choices=FORMATS, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.make:
        for size in SIZES:
            make(options.make, size)
        return
    folder, results = options.models / options.size, {}
    for weights in options.format or FORMATS:
        ours = Pontoon(folder, weights, 18080)
        theirs = LlamaCpp(folder / f"{FORMATS[weights]}.gguf")
        work = {"prefill": lambda one, salt: one.prefill(salt), "decode 1": lambda one, salt: one.decode(salt, 1)}
        for streams in options.streams:
            work[f"decode {streams}"] = lambda one, salt, streams=streams: one.decode(salt, streams)
        for name, measure in work.items():
            runs = {"pontoon": [], "llama.cpp": []}
            for turn in range(options.rounds + 1):
                # The first turn only warms up.
                for who, one in [("pontoon", ours), ("llama.cpp", theirs)]:
                    speed = measure(one, 1000 * turn + len(name))
                    if turn > 0:
                        runs[who].append(speed)
            ratios = [a / b for a, b in zip(runs["pontoon"], runs["llama.cpp"])]
            results[f"{weights} {name}"] = dict(runs, ratio=statistics.median(ratios))
            medians = {who: round(statistics.median(speeds), 1) for who, speeds in runs.items()}
            print(f"{options.size} {weights} {name}: {medians}  ratio {statistics.median(ratios):.2f}", flush=True)
        ours.close()
    if options.out:
        machine = dict(processor=platform.processor() or platform.machine(), cores=os.cpu_count(), threads=THREADS)
        import importlib.metadata

        version = importlib.metadata.version("llama-cpp-python")
        out = dict(machine=machine, llama_cpp_python=version, prompt=PROMPT, decode=DECODE, results=results)
        options.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
