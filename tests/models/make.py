"""Tiny models with random weights, one for each architecture of the matrix, in the chat format of its family."""

from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

# chat formats -----------------------------------------------------------------

ASK = "{%% if add_generation_prompt %%}%s{%% endif %%}"
EACH = "{%% for m in messages %%}%s{%% endfor %%}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
)
ASSISTANT = "<|im_start|>assistant\n"
QUIET = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
TURN = "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
CHATML = EACH % TURN + ASK % ASSISTANT
THINKING = EACH % TURN + ASK % (ASSISTANT + QUIET)
GEMMA = (
    "{{ bos_token }}"
    + NO_SYSTEM
    + EACH
    % (
        ALTERNATE + "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
        "{{ m.content | trim ~ '<end_of_turn>\n' }}"
    )
    + ASK % "<start_of_turn>model\n"
)
MISTRAL = "{{ bos_token }}" + EACH % (
    ALTERNATE + "{{ ' [INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else ' ' ~ m.content ~ eos_token }}"
)
LLAMA3 = (
    "{{ bos_token }}"
    + EACH % "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}"
    + ASK % "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
PHI3 = EACH % "{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}" + ASK % "<|assistant|>\n"


class Chat(NamedTuple):
    """A family's special tokens and chat template."""

    eos: str | None
    bos: str | None = None
    pad: str | None = None
    more: tuple = ()  # further special tokens
    template: str | dict | None = None
    ends: tuple = ()  # the generation config's eos tokens, where there are several


TURNS = ("<start_of_turn>", "<end_of_turn>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
ROLES = ("<|user|>", "<|assistant|>", "<|end|>")
PLAIN = Chat("</s>", "<s>")
TEXT = Chat("<|endoftext|>", "<|endoftext|>")
CHAT = Chat("<|im_end|>", pad="<|endoftext|>", more=("<|im_start|>",), template=CHATML)
BASE = Chat("<|endoftext|>", pad="<|endoftext|>", more=("<|im_start|>", "<|im_end|>"), template=CHATML)
GOOGLE = Chat("<eos>", "<bos>", "<pad>", TURNS, GEMMA, ends=("<eos>", "<end_of_turn>"))
IMAGES = GOOGLE._replace(more=(*TURNS, "<image_soft_token>", "<boi>", "<eoi>"))
META = Chat("<|eot_id|>", "<|begin_of_text|>", more=HEADERS, template=LLAMA3)
PHI = Chat("<|endoftext|>", "<s>", "<|endoftext|>", ROLES, PHI3, ends=("<|endoftext|>", "<|end|>"))
INST = Chat("</s>", "<s>", template=MISTRAL)


def tokenizer_of(chat: Chat):
    """One token per byte, and the family's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = {"bos_token": chat.bos, "eos_token": chat.eos, "pad_token": chat.pad}
    special = {name: token for name, token in named.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=list(chat.more), **special)
    if chat.bos:
        first = [(chat.bos, tokenizer.bos_token_id)]
        post = processors.TemplateProcessing(single=f"{chat.bos} $A", special_tokens=first)
        tokenizer.backend_tokenizer.post_processor = post
    tokenizer.chat_template = chat.template
    return tokenizer


# architectures ----------------------------------------------------------------

DEEP = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
WIDE = dict(DEEP, intermediate_size=128, num_key_value_heads=2, max_position_embeddings=4096)
HEADS = dict(WIDE, head_dim=16)
LOCAL = dict(WIDE, sliding_window=64)
SCALED = dict(HEADS, sliding_window=64, query_pre_attn_scalar=16)
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=2048, initializer_range=0.2)
ROTARY = dict(GPT, rotary_dim=8)
TWO_EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
FOUR_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
MIXED = dict(HEADS, **FOUR_EXPERTS, moe_intermediate_size=32)
SHARED = dict(MIXED, shared_expert_intermediate_size=32)
LATENT = dict(
    WIDE,
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)
ROUTED = dict(
    HEADS,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
NEXT = dict(SHARED, layer_types=["linear_attention", "full_attention"], **LINEAR)
NESTED = dict(
    HEADS,
    sliding_window=64,
    vocab_size_per_layer_input=300,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    laurel_rank=4,
    altup_num_inputs=2,
    layer_types=["sliding_attention", "full_attention"],
    activation_sparsity_pattern=[0.0, 0.0],
)
EYES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
STATES = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8)
FEW = dict(d_model=64, num_layers=2, attention_heads=4, ffn_dim=128, max_position_embeddings=2048)
EARLY = dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=1, moe_num_shared_experts=1)
SEEING = dict(text_config=SCALED, vision_config=EYES, mm_tokens_per_image=4)


class Tiny(NamedTuple):
    """A model of the matrix."""

    type: str  # transformers' `model_type`
    config: dict
    chat: Chat = CHAT
    rows: int = 0  # rows of the embedding beyond the tokenizer's ids


MODELS = {
    "llama": Tiny("llama", WIDE, META, rows=5),
    "llama4": Tiny("llama4_text", dict(HEADS, num_local_experts=2, intermediate_size_mlp=128, attention_chunk_size=64)),
    "mistral": Tiny("mistral", LOCAL, INST),
    "ministral": Tiny("ministral", dict(HEADS, sliding_window=64), INST),
    "mixtral": Tiny("mixtral", dict(WIDE, **TWO_EXPERTS)),
    "gemma": Tiny("gemma", HEADS, GOOGLE),
    "gemma2": Tiny("gemma2", SCALED, GOOGLE),
    "gemma3": Tiny("gemma3_text", SCALED, GOOGLE),
    "gemma3 with images": Tiny("gemma3", SEEING, IMAGES),
    "gemma3n": Tiny("gemma3n_text", NESTED, GOOGLE),
    "qwen2": Tiny("qwen2", dict(WIDE, tie_word_embeddings=True), rows=100),
    "qwen2 base": Tiny("qwen2", WIDE, BASE),
    "qwen2-moe": Tiny("qwen2_moe", SHARED),
    "qwen3": Tiny("qwen3", HEADS, CHAT._replace(template=THINKING)),
    "qwen3-moe": Tiny("qwen3_moe", MIXED),
    "qwen3-next": Tiny("qwen3_next", NEXT),
    "phi": Tiny("phi", WIDE),
    "phi3": Tiny("phi3", WIDE, PHI),
    "phi-moe": Tiny("phimoe", dict(WIDE, **TWO_EXPERTS)),
    "gpt2": Tiny("gpt2", GPT, TEXT),
    "gpt-neo": Tiny("gpt_neo", dict(DEEP, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]), TEXT),
    "gptj": Tiny("gptj", ROTARY),
    "gpt-neox": Tiny("gpt_neox", WIDE, TEXT),
    "gpt-bigcode": Tiny("gpt_bigcode", GPT),
    "gpt-oss": Tiny("gpt_oss", dict(HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=64)),
    "codegen": Tiny("codegen", ROTARY),
    "olmo": Tiny("olmo", WIDE),
    "olmo2": Tiny("olmo2", WIDE),
    "olmo3": Tiny("olmo3", LOCAL),
    "olmoe": Tiny("olmoe", dict(WIDE, **FOUR_EXPERTS)),
    "granite": Tiny("granite", dict(WIDE, logits_scaling=4.0, embedding_multiplier=3.0)),
    "granite-moe": Tiny("granitemoe", dict(WIDE, **TWO_EXPERTS, logits_scaling=4.0)),
    "cohere": Tiny("cohere", dict(WIDE, logit_scale=0.0625)),
    "cohere2": Tiny("cohere2", dict(HEADS, logit_scale=0.25, sliding_window=64)),
    "falcon": Tiny("falcon", dict(DEEP, new_decoder_architecture=True, num_kv_heads=2)),
    "opt": Tiny("opt", dict(DEEP, max_position_embeddings=4096, ffn_dim=128, word_embed_proj_dim=64)),
    "bloom": Tiny("bloom", dict(hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)),
    "mpt": Tiny("mpt", dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=2048, initializer_range=0.2)),
    "stablelm": Tiny("stablelm", WIDE),
    "starcoder2": Tiny("starcoder2", LOCAL),
    "smollm3": Tiny("smollm3", WIDE),
    "glm": Tiny("glm", HEADS),
    "glm4": Tiny("glm4", HEADS),
    "glm4-moe": Tiny("glm4_moe", ROUTED),
    "nemotron": Tiny("nemotron", WIDE),
    "ernie4.5": Tiny("ernie4_5", HEADS),
    "ernie4.5-moe": Tiny("ernie4_5_moe", dict(HEADS, **EARLY)),
    "dots1": Tiny("dots1", ROUTED),
    "arcee": Tiny("arcee", HEADS),
    "persimmon": Tiny("persimmon", WIDE),
    "xglm": Tiny("xglm", FEW),
    "biogpt": Tiny("biogpt", WIDE),
    "exaone4": Tiny("exaone4", dict(LOCAL, sliding_window_pattern=2)),
    "seed-oss": Tiny("seed_oss", HEADS),
    "hunyuan": Tiny("hunyuan_v1_dense", HEADS),
    "apertus": Tiny("apertus", WIDE),
    "helium": Tiny("helium", HEADS),
    "deepseek-v2": Tiny("deepseek_v2", LATENT),
    "deepseek-v3": Tiny("deepseek_v3", LATENT),
    "lfm2": Tiny("lfm2", dict(WIDE, layer_types=["conv", "full_attention"])),
    "bamba": Tiny("bamba", dict(WIDE, attn_layer_indices=[1], **STATES)),
    "falcon-h1": Tiny("falcon_h1", dict(HEADS, mamba_d_ssm=128, **STATES)),
    "rwkv": Tiny("rwkv", dict(hidden_size=64, num_hidden_layers=2, attention_hidden_size=64)),
    "mamba": Tiny("mamba", dict(hidden_size=64, num_hidden_layers=2, state_size=4, initializer_range=0.2)),
}

BROKEN = "{% for m in messages %}{{ m.content }}"
CAPITALS = CHATML.replace("m.content", "m.content | upper")
ODD = {  # one architecture, with what people's models have besides
    "no chat template": Tiny("llama", WIDE, PLAIN),
    "several templates": Tiny("llama", WIDE, CHAT._replace(template={"default": CHATML, "tool_use": "tools"})),
    "no eos token": Tiny("llama", WIDE, PLAIN._replace(eos=None)),
    "context of 256": Tiny("llama", dict(WIDE, max_position_embeddings=256)),
    "template with an error": Tiny("llama", WIDE, CHAT._replace(template=BROKEN)),
    "template in capitals": Tiny("llama", WIDE, CHAT._replace(template=CAPITALS)),
    "ids beyond the embedding": Tiny("llama", dict(WIDE, tie_word_embeddings=True), rows=-2),
}


def config_of(tiny: Tiny, tokenizer):
    """The model's configuration, with the tokenizer's ids in it."""
    ids = {"vocab_size": len(tokenizer) + tiny.rows}
    if tiny.rows >= 0:
        ids |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if "text_config" not in tiny.config:
        return AutoConfig.for_model(tiny.type, **tiny.config, **ids)
    image, first, last = tokenizer.convert_tokens_to_ids(["<image_soft_token>", "<boi>", "<eoi>"])
    text = tiny.config["text_config"] | ids
    marks = {"image_token_index": image, "boi_token_index": first, "eoi_token_index": last}
    return AutoConfig.for_model(tiny.type, **tiny.config | {"text_config": text} | marks)


def save(name: str, folder: Path) -> Path:
    """Write a model of the matrix as a folder like any other."""
    tiny = (MODELS | ODD)[name]
    tokenizer = tokenizer_of(tiny.chat)
    kind = AutoModelForImageTextToText if "vision_config" in tiny.config else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config_of(tiny, tokenizer))
    if tiny.chat.ends:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(tiny.chat.ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
