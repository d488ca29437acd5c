"""Makes the golden files of what serving adds to a model: adapters (by PEFT) and the extra layer for multi-token
prediction (by DeepSeek's published formula; transformers ignores that layer).

Run by hand after make_goldens.py, never by the tests, with torch (CPU), transformers 5, peft and safetensors:

    python tests/golden/make_serving_goldens.py

data/lora/{plain,rooted}/: adapters for the model data/qwen3; data/lora/golden.safetensors: logits.NAME of its input_ids
data/deepseek_v3_plain_mtp/mtp.safetensors: from position i's hidden state and token i + 1, for all but the last
    position: next_ids, hidden (the last norm's rows), mtp_hidden (what the extra layer's head reads), mtp_logits.
"""

import shutil
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

DATA = Path(__file__).parent / "data"
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def make_adapters():
    folder = DATA / "lora"
    shutil.rmtree(folder, ignore_errors=True)
    ids = load_file(DATA / "qwen3" / "golden.safetensors")["input_ids"]
    golden = {}
    kinds = {
        "plain": dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
        "rooted": dict(r=6, lora_alpha=3, use_rslora=True, target_modules="all-linear"),
    }
    for seed, (name, options) in enumerate(kinds.items()):
        base = transformers.Qwen3ForCausalLM.from_pretrained(DATA / "qwen3", dtype=torch.float32, **EAGER).eval()
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in model.named_parameters():
            if "lora_" in key:
                tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        with torch.no_grad():
            golden[f"logits.{name}"] = model(input_ids=ids).logits.contiguous()
        model.peft_config["default"].base_model_name_or_path = "qwen3"
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)
    save_file(golden, folder / "golden.safetensors")


def make_mtp():
    folder = DATA / "deepseek_v3_plain_mtp"
    weights = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()
    ids = load_file(folder / "golden.safetensors")["input_ids"]
    extra = config.num_hidden_layers
    stem = f"model.layers.{extra}."
    wide = transformers.AutoConfig.from_pretrained(folder)
    wide.num_hidden_layers = extra + 1
    wide._attn_implementation = "eager"
    wide._experts_implementation = "eager"
    # A model with one layer more, so that its weights are read as transformers reads any layer's.
    block_weights = {k: v for k, v in weights.items()}
    scratch = DATA / "scratch"
    scratch.mkdir(exist_ok=True)
    save_file(block_weights, scratch / "model.safetensors", metadata={"format": "pt"})
    wide.save_pretrained(scratch)
    deeper = transformers.DeepseekV3ForCausalLM.from_pretrained(scratch, dtype=torch.float32, **EAGER).eval()
    shutil.rmtree(scratch)
    block = deeper.model.layers[extra]

    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps))

    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        following = ids[:, 1:]
        embedded = weights[stem + "embed_tokens.weight"][following]
        joined = torch.cat(
            [norm(embedded, weights[stem + "enorm.weight"]), norm(hidden, weights[stem + "hnorm.weight"])], dim=-1
        )
        x = joined @ weights[stem + "eh_proj.weight"].T
        count = x.shape[1]
        positions = torch.arange(count)[None].expand(x.shape[0], -1)
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None].expand(x.shape[0], 1, -1, -1)
        rotary = deeper.model.rotary_emb(x, positions)
        out = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        out = out[0] if isinstance(out, tuple) else out
        out = norm(out, weights[stem + "shared_head.norm.weight"])
        logits = out @ weights[stem + "shared_head.head.weight"].T
    tensors = dict(next_ids=following, hidden=hidden, mtp_hidden=out, mtp_logits=logits)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "mtp.safetensors")
    print("mtp logits", logits.abs().max().item())


if __name__ == "__main__":
    make_adapters()
    make_mtp()
