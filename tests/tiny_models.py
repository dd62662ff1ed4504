"""Small random models of many families with a tokenizer of their own, saved as folders that from_pretrained loads."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RecurrentGemmaConfig,
)
from transformers.models.auto import AutoModelForCausalLM

LINES = (
    "The heart pumps blood through the body, and blood carries oxygen from the lungs to every organ.",
    "What are the symptoms of influenza? Fever, cough, sore throat and muscle pain.",
    "The treatment of asthma rests on inhaled medicines that open the airways.",
    "You are a careful assistant. When should I see a doctor?",
    "高血压患者平时要注意什么？少吃盐，多运动，按时吃药。",
    "流感的症状有发热、咳嗽、咽痛和肌肉疼痛。",
    "什么时候应该去看医生？呼吸困难时请立即就医。",
)
VOCABULARY = 400

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (  # the turn ends with <|eot_id|>, which is not the tokenizer's eos
    "{{ bos_token }}{% for message in messages %}{{ '<|role|>' + message['role'] + '\\n\\n' + message['content'] }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|role|>assistant\\n\\n' }}{% endif %}"
)
GEMMA = (  # knows no system role, calls the assistant "model" and strips what it says
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GLM4 = (  # nothing ends a turn: the next role does
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GLM4_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")


def tokenizer(eos: str, bos=None, pad=None, unk=None, template=None, others=()) -> PreTrainedTokenizerFast:
    """Byte-level BPE with VOCABULARY ids, special tokens first; the same at every run."""
    special = list(dict.fromkeys(token for token in (eos, bos, pad, unk, *others) if token))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        unk_token=unk,
        extra_special_tokens=list(others),
    )
    made.chat_template = template
    return made


LLAMA_SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}

# family: config class, its size, the tokenizer (as the real family's, with one departure each)
PLAIN = {"eos": "</s>", "bos": "<s>", "unk": "<unk>"}
FAMILIES = {
    # No template, no pad token but <unk> to pad with, as the bases of llama 2, mistral and bloom.
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}, PLAIN),
    "mistral": (MistralConfig, LLAMA_SIZE, PLAIN),
    # One special token only: nothing to pad with but eos.
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}, {"eos": "<|endoftext|>"}),
    # As Pythia: its files call the output layer by another name than the model does.
    "neox": (
        GPTNeoXConfig,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"eos": "<|endoftext|>", "pad": "<|padding|>"},
    ),
    # pad == eos with ChatML, as SmolLM2.
    "llama": (
        LlamaConfig,
        LLAMA_SIZE,
        {
            "eos": "<|im_end|>",
            "bos": "<|im_start|>",
            "pad": "<|im_end|>",
            "unk": "<|endoftext|>",
            "template": CHATML,
        },
    ),
    # eos is not the end of turn, as llama 3.
    "llama3": (
        LlamaConfig,
        LLAMA_SIZE,
        {"eos": "<|end|>", "bos": "<|begin|>", "template": LLAMA3, "others": ("<|eot_id|>", "<|role|>")},
    ),
    # No bos.
    "qwen3": (
        Qwen3Config,
        LLAMA_SIZE,
        {"eos": "<|im_end|>", "pad": "<|endoftext|>", "template": CHATML, "others": ("<|im_start|>",)},
    ),
    # One more token id than embedding rows, and a template that refuses the system role.
    "gemma3": (
        Gemma3TextConfig,
        LLAMA_SIZE | {"sliding_window": 64, "query_pre_attn_scalar": 8},
        {
            "eos": "<eos>",
            "bos": "<bos>",
            "pad": "<pad>",
            "unk": "<unk>",
            "template": GEMMA,
            "others": ("<start_of_turn>", "<end_of_turn>"),
        },
    ),
    "glm4": (
        Glm4Config,
        LLAMA_SIZE,
        {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "template": GLM4, "others": GLM4_TOKENS},
    ),
}

# Mixtures of experts, each with a departure of its own.
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DENSE_FIRST = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MIXTURES = {
    "mixtral": (MixtralConfig, LLAMA_SIZE | EXPERTS, FAMILIES["llama"][2]),
    # A dense block, and experts that every token sees, whose layers are called as those of the others.
    "deepseek": (
        DeepseekV3Config,
        LLAMA_SIZE | EXPERTS | LATENT | DENSE_FIRST | {"num_key_value_heads": 4, "moe_intermediate_size": 16},
        FAMILIES["llama"][2],
    ),
    # Its router is an nn.Linear that returns two tensors.
    "llama4": (
        Llama4TextConfig,
        LLAMA_SIZE | EXPERTS | {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "attention_chunk_size": 64},
        FAMILIES["llama3"][2],
    ),
    "gpt_oss": (GptOssConfig, LLAMA_SIZE | EXPERTS, FAMILIES["llama"][2]),
}


def save_tiny(family: str, folder: Path) -> str:
    """Save a causal language model with its tokenizer into `folder` and return that as text."""
    config_class, size, words = (FAMILIES | MIXTURES)[family]
    made = tokenizer(**words)
    config = config_class(
        vocab_size=len(made),
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        **size,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if family == "gemma3":
        made.add_tokens([AddedToken("<image_soft_token>", special=True)])
    if family == "llama":  # what a published chat model asks for, and PPO must not sample with
        model.generation_config.update(do_sample=True, top_k=5, temperature=0.2, repetition_penalty=1.3)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def save_tiny_recurrent(folder: Path) -> str:
    """A model that reads padding before a prompt as if it were tokens; its weights are large enough to tell."""
    made = tokenizer(**FAMILIES["llama"][2])
    size = {name: LLAMA_SIZE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    ids = {"vocab_size": len(made), "pad_token_id": made.pad_token_id, "eos_token_id": made.eos_token_id}
    config = RecurrentGemmaConfig(**size, **ids, num_hidden_layers=3, lru_width=32, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def save_tiny_bert(folder: Path) -> str:
    """A reward model with nothing in common with the policy: BERT with a WordPiece tokenizer and no chat template."""
    folder.mkdir()
    letters = sorted(set("".join(LINES).lower()) - {" "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    made = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128)
    config = BertConfig(
        vocab_size=len(made),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=1,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)
