"""Which layers an adapter reaches, in architectures that name and store them in different ways."""

import json, warnings

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM

from scir.model.weights import body, load_adapter, lora_config, new_adapter, reach_summary, reached, tiny_model
from scir.recipe import LoraSpec, RecipeError, parse_recipe
from scir.method.trainer import save_adapter

LLAMA = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
EXPERTS = dict(LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ROUTED = dict(
    LLAMA,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    first_k_dense_replace=1,
)
GPT2 = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
MODELS = {
    "phi3": dict(LLAMA, pad_token_id=0),
    "gpt_neox": LLAMA,
    "gpt2": GPT2,
    "codegen": dict(GPT2, rotary_dim=4),
    "falcon": LLAMA,
    "opt": dict(LLAMA, ffn_dim=64, word_embed_proj_dim=32),
    "mpt": dict(vocab_size=300, d_model=32, n_heads=4, n_layers=2),
    "mixtral": dict(LLAMA, num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": EXPERTS,
    "llama4_text": dict(LLAMA, head_dim=8, num_local_experts=2, intermediate_size_mlp=64),
    "deepseek_v3": dict(ROUTED, num_key_value_heads=4),
    "lfm2": dict(LLAMA, layer_types=["conv", "full_attention"]),
    "gemma3": dict(
        text_config=dict(LLAMA, head_dim=8),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
    ),
}


def model_of(name, device="meta"):
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name])).eval().requires_grad_(False)


def adapted_names(model):
    "Names of the modules and parameters with LoRA, layer numbers left out."
    found = set()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            found.add(
                (
                    ".".join(p for p in name.split(".") if not p.isdigit() and p != "base_layer"),
                    getattr(module, "parameter_name", ""),
                )
            )
    return {".".join(filter(None, (n.split(".")[-1], p))) for n, p in found}


def test_the_embedded_models_keep_their_adapters():
    for targets, last, names in (
        ("all-linear", None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", 1, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ):
        config = lora_config(tiny_model()[0], LoraSpec(targets=targets, last_layers=last))
        assert config.target_modules == names and config.layers_to_transform == (last and [1])
        assert config.target_parameters is None and config.exclude_modules is None and config.fan_in_fan_out is False


@pytest.mark.parametrize(
    "name, names",
    [
        ("phi3", {"qkv_proj", "o_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("gpt2", {"c_attn", "c_proj"}),
        ("codegen", {"qkv_proj", "out_proj"}),
        ("falcon", {"query_key_value", "dense"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("mpt", {"Wqkv", "out_proj"}),
        ("lfm2", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("gemma3", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_attention_is_all_of_it_and_nothing_else(name, names):
    model = new_adapter(model_of(name), LoraSpec(targets="attention"))
    assert adapted_names(model) == names
    assert all("attn" in n.lower() or "attention" in n.lower() for n, _ in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("last", [None, 1])
def test_all_linear_layers_and_experts_get_an_adapter(name, last):
    base, spec = model_of(name), LoraSpec(last_layers=last)
    reach = reached(base, spec)
    assert {w.kind for w in reach.frozen} <= {"router", "Conv1d"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # peft's, for what it does not find
        with torch.device("meta"):
            model = new_adapter(base, spec)
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == len(reach.adapted)
    assert last is None or not any(".0." in n for n, _ in model.named_parameters() if "lora_" in n)


def test_a_vision_tower_gets_no_adapter():
    model = new_adapter(model_of("gemma3"), LoraSpec())
    lora = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert len(lora) == 2 * 2 * 7 and all("language_model" in n for n in lora)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "llama4_text"])
def test_what_is_saved_is_what_is_loaded_and_merged(name, tmp_path):
    "Also the layers beside the experts, whose names peft takes for older experts."
    ids = torch.arange(3, 20)[None]
    before = model_of(name, "cpu")(ids).logits
    model = new_adapter(model_of(name, "cpu"), LoraSpec(r=2, alpha=4)).eval()
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    after = model(ids).logits
    after.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # which DDP waits for
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert all(
        config[k] == sorted(config[k] or []) for k in ("target_modules", "target_parameters") if config[k] is not None
    )
    loaded = load_adapter(model_of(name, "cpu"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, after) and not torch.allclose(after, before, atol=1e-2)
    loaded.load_adapter(str(tmp_path / "adapter"), adapter_name="reference")
    loaded.set_adapter("reference")
    assert torch.equal(loaded(ids).logits, after)
    loaded.set_adapter("default")
    assert torch.allclose(loaded.merge_and_unload()(ids).logits, after, atol=1e-3)


def test_what_stays_frozen_is_counted():
    assert reach_summary(model_of("mixtral"), LoraSpec())["frozen"] == "mlp.gate x2"
    hybrid = reach_summary(model_of("lfm2"), LoraSpec(targets="attention"))
    assert "self_attn.q_proj x1" in hybrid["adapted"] and "conv.in_proj x1" in hybrid["frozen"]
    assert (
        "experts.down_proj x2" in reach_summary(model_of("mixtral"), LoraSpec(dropout=0.1))["frozen"]
    )  # peft adapts parameters without dropout only
    tiny = tiny_model()[0]
    found, kept = reach_summary(tiny, LoraSpec()), [p.numel() for n, p in tiny.named_parameters() if "proj" in n]
    assert (
        found["weights"] == sum(kept)
        and found["fraction"] == pytest.approx(sum(kept) / sum(p.numel() for p in tiny.parameters()))
        and not found["frozen"]
    )


def test_a_list_of_names():
    spec = LoraSpec(targets=("v_proj", "experts"), last_layers=1)
    assert adapted_names(new_adapter(model_of("mixtral"), spec)) == {
        "v_proj",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert adapted_names(new_adapter(model_of("gpt2"), LoraSpec(targets=("mlp.c_proj",)))) == {"c_proj"}
    with pytest.raises(RecipeError, match="no layer qproj; it has q_proj"):
        lora_config(tiny_model()[0], LoraSpec(targets=("q_proj", "qproj")))
    for wrong in ("atention", [], 3, [3]):
        with pytest.raises(RecipeError, match="lora.targets.*all-linear, attention, or a list of layer names"):
            parse_recipe({"lora": {"targets": wrong}})


def test_a_model_without_attention_is_refused_with_its_names():
    mamba = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(mamba)
    with pytest.raises(RecipeError, match="mixer.in_proj x2"):
        new_adapter(model, LoraSpec(targets="attention"))
    assert "mixer.out_proj x2" in reach_summary(model, LoraSpec())["frozen"]  # peft refuses it there
    assert body(model_of("llama4_text"))[1] is not body(model_of("llama4_text"))[0]


def test_the_run_records_what_its_adapter_reaches(tiny_run):
    summary = json.loads((tiny_run / "manifest.json").read_text())["steps"]["sft:seed0/sft"]["summary"]
    assert (
        summary["adapter"]["targets"] == "all-linear"
        and 0 < summary["adapter"]["fraction"] < 1
        and "q_proj x2" in summary["adapter"]["adapted"]
    )
