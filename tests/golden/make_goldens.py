"""Makes every golden file under tests/golden/data from Hugging Face transformers.

Run by hand, never by the tests, in an environment with torch (CPU), transformers 5 and safetensors:

    python tests/golden/make_goldens.py [case ...]

Each model case is a folder as on the hub (config.json, *.safetensors, generation_config.json) plus golden.safetensors:
    input_ids, logits, logits_bf16 (as f32), loss, grad.<name on disk>; for fp8 also dequantised.<name on disk>.
Loss is the mean cross-entropy of the next token; gradients are the loss's, for every parameter on disk.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
BATCH, TOKENS, VOCAB = 2, 13, 97

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

# The plain loops: fused kernels need aligned sizes and round in another order.
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
COMMON = dict(
    vocab_size=VOCAB,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    **EAGER,
)
LLAMA = dict(
    COMMON,
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
)
QWEN3 = dict(
    COMMON,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    eos_token_id=[2, 5],
)
QWEN3_MOE = dict(QWEN3, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=11, head_dim=6)
DEEPSEEK = dict(
    COMMON,
    hidden_size=28,
    intermediate_size=38,
    moe_intermediate_size=10,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    n_shared_experts=2,
    n_routed_experts=12,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    kv_lora_rank=14,
    q_lora_rank=18,
    qk_rope_head_dim=6,
    qk_nope_head_dim=10,
    v_head_dim=9,
    rms_norm_eps=1e-5,
    num_nextn_predict_layers=0,
)
DEEPSEEK_YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=8.0,
    original_max_position_embeddings=8,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.8,
)

# name -> (class prefix, configuration, options)
CASES = {
    "llama2": ("Llama", dict(LLAMA, num_key_value_heads=6, tie_word_embeddings=False), {}),
    "llama3": (
        "Llama",
        dict(
            LLAMA,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        dict(shard="16KB"),
    ),
    "llama_linear": (
        "Llama",
        dict(LLAMA, num_hidden_layers=1, num_key_value_heads=3, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5)),
        {},
    ),
    "llama_dynamic": (
        "Llama",
        # Shorter than the sequence, so that the rescaled base is in use.
        dict(
            LLAMA,
            max_position_embeddings=8,
            num_hidden_layers=1,
            rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
        ),
        {},
    ),
    "llama_yarn": (
        "Llama",
        dict(
            LLAMA,
            num_hidden_layers=1,
            head_dim=10,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1000.0, factor=8.0, original_max_position_embeddings=8
            ),
        ),
        {},
    ),
    "llama_bias": (
        "Llama",
        dict(LLAMA, num_hidden_layers=1, attention_bias=True, mlp_bias=True),
        {},
    ),
    "qwen3": ("Qwen3", dict(QWEN3, tie_word_embeddings=True), {}),
    "qwen3_moe": ("Qwen3Moe", dict(QWEN3_MOE, num_hidden_layers=2, norm_topk_prob=True), {}),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        dict(QWEN3_MOE, num_hidden_layers=4, norm_topk_prob=False, mlp_only_layers=[1], decoder_sparse_step=2),
        {},
    ),
    "deepseek_v3": ("DeepseekV3", dict(DEEPSEEK, rope_parameters=DEEPSEEK_YARN), {}),
    "deepseek_v3_plain_mtp": (
        "DeepseekV3",
        dict(DEEPSEEK, num_hidden_layers=2, q_lora_rank=None, norm_topk_prob=True),
        dict(mtp=True),
    ),
    "deepseek_v3_fp8": (
        "DeepseekV3",
        # Wider than one 128 x 128 block in a few tensors only: the dense layer and kv_b_proj.
        dict(
            DEEPSEEK,
            num_hidden_layers=2,
            intermediate_size=140,
            num_attention_heads=7,
            num_key_value_heads=7,
            rope_parameters=DEEPSEEK_YARN,
        ),
        dict(fp8=True),
    ),
}


def randomise(model, generator):
    """Draws every parameter and buffer large enough that a wrong term shows in the logits."""
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if "norm" in name:
                tensor.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(0.5 * noise)
            elif "e_score_correction_bias" in name:
                tensor.copy_(0.3 * noise)
            elif ".mlp.gate." in name:
                tensor.copy_(0.4 * noise)
            else:
                tensor.copy_(0.15 * noise)


def selections(model, ids):
    """The experts every router picked, as sorted lists, to see whether a choice is fragile."""
    seen, hooks = [], []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter") or type(module).__name__.endswith("TopkRouter"):
            hooks.append(module.register_forward_hook(lambda _m, _i, out: seen.append(out[-1].sort(-1)[0])))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def stable(model, ids, generator):
    """True if no router's choice changes under noise of the size of bf16's rounding.

    A bf16 comparison is worthless on a sample where rounding may legitimately pick another expert.
    """
    base = selections(model, ids)
    if not base:
        return True
    state = {k: v.clone() for k, v in model.state_dict().items()}
    steady = True
    for _ in range(6):
        noisy = {k: v * (1 + 2**-8 * torch.randn(v.shape, generator=generator)) for k, v in state.items()}
        model.load_state_dict(noisy)
        steady = steady and all(torch.equal(a, b) for a, b in zip(base, selections(model, ids)))
        if not steady:
            break
    model.load_state_dict(state)
    return steady


def on_disk(name, tensor):
    """Yields (name on disk, tensor) of one in-memory parameter: fused experts are split."""
    if name.endswith(".experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        for expert, both in enumerate(tensor):
            gate, up = both.chunk(2, dim=0)
            yield f"{stem}{expert}.gate_proj.weight", gate.contiguous()
            yield f"{stem}{expert}.up_proj.weight", up.contiguous()
    elif name.endswith(".experts.down_proj"):
        stem = name.removesuffix("down_proj")
        for expert, down in enumerate(tensor):
            yield f"{stem}{expert}.down_proj.weight", down.contiguous()
    else:
        yield name, tensor.contiguous()


def weights_on_disk(folder):
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                tensors[name] = opened.get_tensor(name)
    return tensors


def add_mtp(folder, config, generator):
    """Adds a multi-token-prediction layer as DeepSeek publishes it; transformers must ignore it too."""
    weights = load_file(folder / "model.safetensors")
    last, extra = config.num_hidden_layers - 1, config.num_hidden_layers
    width = config.hidden_size
    for name, tensor in list(weights.items()):
        if f".layers.{last}." in name:
            weights[name.replace(f".layers.{last}.", f".layers.{extra}.")] = tensor.clone()
    stem = f"model.layers.{extra}."
    for name, shape in {
        "enorm.weight": (width,),
        "hnorm.weight": (width,),
        "eh_proj.weight": (width, 2 * width),
        "shared_head.norm.weight": (width,),
        "shared_head.head.weight": (VOCAB, width),
        "embed_tokens.weight": (VOCAB, width),
    }.items():
        weights[stem + name] = torch.randn(shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", num_nextn_predict_layers=1)


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def quantise_block(weight):
    """(e4m3 weight, one f32 scale per 128 x 128 block, the value they stand for)."""
    rows, columns = weight.shape
    scales = torch.empty((rows + 127) // 128, (columns + 127) // 128)
    quantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = (slice(r * 128, r * 128 + 128), slice(c * 128, c * 128 + 128))
            scales[r, c] = weight[block].abs().max() / 448.0
            quantised[block] = (weight[block] / scales[r, c]).to(torch.float8_e4m3fn)
    spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return quantised, scales, quantised.float() * spread


def quantise(weights):
    """The tensors of an fp8 export and the f32 values they stand for."""
    written, meant = {}, {}
    for name, tensor in weights.items():
        quantisable = tensor.dim() == 2 and "_proj" in name
        if quantisable:
            written[name], scales, meant[name] = quantise_block(tensor)
            written[name + "_scale_inv"] = scales
        else:
            written[name] = meant[name] = tensor
    return written, meant


def run(model, ids, golden):
    """Records logits, loss and gradients of `model` in `golden`."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    golden["logits"], golden["loss"] = out.logits.detach().float(), out.loss.detach().reshape(1)
    rotary = model.model.rotary_emb
    golden["rope.inverse_frequencies"] = rotary.inv_freq.float().clone()
    golden["rope.attention_factor"] = torch.tensor([float(rotary.attention_scaling)])
    for name, parameter in model.named_parameters():
        for disk_name, gradient in on_disk(name, parameter.grad):
            golden[f"grad.{disk_name}"] = gradient


def make_case(name):
    prefix, config_values, options = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**config_values)
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        model = model_class(config).eval()
        randomise(model, generator)
        ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=generator)
        if stable(model, ids, generator):
            break
    else:
        raise SystemExit(f"{name}: no seed gives a steady choice of experts")
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, max_shard_size=options.get("shard", "1GB"))
    golden = {"input_ids": ids}
    weights = weights_on_disk(folder)
    if options.get("fp8"):
        written, meant = quantise(weights)
        save_file(meant, folder / "model.safetensors", metadata={"format": "pt"})
        model = model_class.from_pretrained(folder, **EAGER).eval()
        golden.update({f"dequantised.{k}": v for k, v in meant.items() if k + "_scale_inv" in written})
    run(model, ids, golden)
    half = model_class.from_pretrained(folder, dtype=torch.bfloat16, **EAGER).eval()
    with torch.no_grad():
        golden["logits_bf16"] = half(input_ids=ids).logits.float()
    if options.get("fp8"):
        golden = {k: v for k, v in golden.items() if not k.startswith("grad.")}
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
        quantisation = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[128, 128])
        edit_json(folder / "config.json", quantization_config=quantisation)
    else:
        buffers = {n for n in weights if "e_score_correction_bias" in n}
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        with_gradient = {n.removeprefix("grad.") for n in golden if n.startswith("grad.")}
        assert with_gradient | buffers == set(weights) | tied - tied, set(weights) ^ with_gradient
    if options.get("mtp"):
        add_mtp(folder, config, generator)
        again = model_class.from_pretrained(folder, **EAGER).eval()
        assert torch.equal(again(input_ids=ids).logits, golden["logits"])
    save_file(golden, folder / "golden.safetensors")
    error = (golden["logits_bf16"] - golden["logits"]).abs().max() / golden["logits"].abs().max()
    size = sum(os.path.getsize(f) for f in folder.iterdir())
    print(f"{name}: seed {seed}, loss {golden['loss'].item():.3f}, bf16 error {error:.4f}, {size} bytes")


def make_tokenizer():
    """A small byte-level tokenizer trained on sentences of ours, and what it makes of awkward text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["A pontoon bridge is laid on whatever boats there are.", "One sinks, and the bridge stands."] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in ["<|end|>", "<|user|>", "<|assistant|>"]],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    folder = DATA / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    samples = []
    for sample in ["The bridge stands.", "", "naïve café — 橋 🚣🏽‍♀️!", "<|user|>boats<|end|>\n", "  two  spaces\t\ttabs"]:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        decoded = {"all": tokenizer.decode(ids, skip_special_tokens=False), "plain": tokenizer.decode(ids)}
        samples.append({"text": sample, "ids": ids, **decoded})
    dump(folder / "samples.json", samples)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


def dump(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "Depth of the river in metres, <b>not</b> feet & 'yards'",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
USER = {"role": "user", "content": "  How deep is it at the bridge? "}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "depth", "arguments": {"place": "Zürich", "n": 1.0}}}]}
REPLY = {"role": "assistant", "content": "<think>\nhm, 3?\n</think>\n\nThree metres.\nRight?"}
SYSTEM = {"role": "system", "content": "Be brief.\nBe <kind>."}
CONVERSATIONS = [
    dict(messages=[USER], add_generation_prompt=True),
    dict(messages=[SYSTEM, USER, REPLY, USER], add_generation_prompt=True, enable_thinking=False),
    dict(messages=[SYSTEM, USER, CALL, {"role": "tool", "content": "{\"m\": 3}"}, REPLY], tools=[TOOL]),
    dict(messages=[USER, REPLY]),
    dict(messages=[REPLY, USER]),
]


def make_chat():
    """Renders the templates in tests/golden/chat (ours) with transformers' own renderer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for path in sorted((DATA.parent / "chat").glob("*.jinja")):
        cases = []
        for conversation in CONVERSATIONS:
            given = dict(conversation)
            messages, tools = given.pop("messages"), given.pop("tools", None)
            case = dict(conversation, bos_token="<s>", eos_token="</s>")
            try:
                rendered, _ = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=path.read_text(),
                    bos_token="<s>",
                    eos_token="</s>",
                    **given,
                )
                case["rendered"] = rendered[0]
            except Exception as error:
                case["error"] = str(error)
            cases.append(case)
        dump(path.with_suffix(".json"), cases)
        print(f"chat {path.stem}: {sum('rendered' in c for c in cases)} of {len(cases)} render")


if __name__ == "__main__":
    chosen = sys.argv[1:] or [*CASES, "tokenizer", "chat"]
    for chosen_name in chosen:
        {"tokenizer": make_tokenizer, "chat": make_chat}.get(chosen_name, lambda: make_case(chosen_name))()
