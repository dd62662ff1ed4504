"""Wrong command lines, models, files and folders: exit code 2, one message that names the thing, nothing written."""

import gzip
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import ADAPTER, ROOT, SCRIPTS, in_process, in_subprocess, merge, stage, write_lines, write_records
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

LONGEST = 10  # seconds


@pytest.fixture(scope="module")
def house(tiny, records, tmp_path_factory):
    """A tiny llama, trained adapters, and one folder for each thing that can be wrong with a model or with records."""
    root = tmp_path_factory.mktemp("house")
    llama = tiny("llama")
    in_process(*stage("pt", llama, records, root / "adapter")).ok()
    in_process(*stage("rm", llama, records, root / "rm")).ok()

    def model(name, **files) -> Path:
        """A copy of the model with some of its files replaced, or left out (None)."""
        folder = shutil.copytree(llama, root / name)
        for path, content in files.items():
            path = next(p for p in folder.iterdir() if p.name.startswith(path))
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        return folder

    weights = (Path(llama) / "model.safetensors").read_bytes()
    model("half weights", model=weights[: len(weights) // 2])
    model("no weights", model=None)
    model("no config", config=None)
    model("broken config", config=b'{"model_type": "llama"')
    model("unknown type", config=b'{"model_type": "lama5"}')
    model("no tokenizer", tokenizer=None).joinpath("tokenizer_config.json").unlink()
    model("broken template", chat_template=b"{% for message in messages %}{{ message['content'] }}")
    model("other weights", model=weights[:-4000] + bytes(4000))
    for path in (root / "adapter").glob("adapter_*"):
        shutil.copy(path, model("both") if not (root / "both").exists() else root / "both")
    no_eos = model("no eos")
    settings = json.loads((no_eos / "tokenizer_config.json").read_text())
    (no_eos / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    tensors = load_file(Path(llama) / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(headless, model("no output layer") / "model.safetensors", {"format": "pt"})
    other_sizes = model("other sizes")
    settings = json.loads((other_sizes / "config.json").read_text())
    (other_sizes / "config.json").write_text(json.dumps(settings | {"intermediate_size": 48}))
    for name, content in (("half adapter", slice(0, 2000)), ("no adapter weights", None)):
        folder = shutil.copytree(root / "adapter", root / name)
        data = (folder / ADAPTER).read_bytes()
        (folder / ADAPTER).unlink()
        if content:
            (folder / ADAPTER).write_bytes(data[content])
    tensors = load_file(root / "adapter" / ADAPTER)
    embedding = {"base_model.model.model.embed_tokens.weight": torch.zeros(405, 32)}
    for name, content in (("empty adapter", {}), ("grown adapter", tensors | embedding)):
        save_file(content, shutil.copytree(root / "adapter", root / name) / ADAPTER)
    (shutil.copytree(root / "no adapter weights", root / "empty bin") / "adapter_model.bin").touch()
    for name in ("adapter", "rm"):
        folder = shutil.copytree(root / name, root / f"{name} of another rank")
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 3}))
    folder = shutil.copytree(root / "adapter", root / "broken adapter config")
    (folder / "adapter_config.json").write_text("{")
    settings = json.loads((root / "rm" / "adapter_config.json").read_text())
    folder = shutil.copytree(root / "rm", root / "adapter of nothing")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    folder = shutil.copytree(root / "rm", root / "rm of no task")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"task_type": None}))
    folder = shutil.copytree(root / "rm", root / "damaged base")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(root / "rm")}))
    (folder / "base.json").write_text('{"base": ')
    folder = shutil.copytree(root / "rm", root / "rm without head")
    tensors = {name: tensor for name, tensor in load_file(folder / ADAPTER).items() if ".score." not in name}
    save_file(tensors, folder / ADAPTER)

    in_process(*merge(llama, root / "rm", root / "rm whole")).ok()
    headless = model("whole without head")
    settings = json.loads((headless / "config.json").read_text())
    scores = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (headless / "config.json").write_text(json.dumps(settings | scores))
    (model("two labels") / "config.json").write_text(json.dumps(settings | scores | {"num_labels": 2}))

    model("another model")
    (root / "another adapter").mkdir()
    for path in (root / "adapter").glob("adapter_*"):
        shutil.copy(path, root / "another adapter")
    (root / "empty").mkdir()
    (root / "a file").write_text("x")
    for name, text in (("cut", '{"text": "cut o\n'), ("wrong form", '{"weather": "fine"}\n'), ("number", "7\n")):
        write_records(root / name)
        for folder in SCRIPTS:
            with (root / name / folder / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(text)
    for folder in SCRIPTS:
        (root / "no lines" / folder).mkdir(parents=True)
        (root / "no lines" / folder / "rows.jsonl").write_text("\n\n")
        (root / "pictures" / folder).mkdir(parents=True)
        (root / "pictures" / folder / "a.png").write_bytes(b"\x89PNG")
        (root / "cut gz" / folder).mkdir(parents=True)
        packed = gzip.compress((records / folder / "rows.jsonl").read_bytes())
        (root / "cut gz" / folder / "rows.jsonl.gz").write_bytes(packed[: len(packed) // 2])
        (root / "not parquet" / folder).mkdir(parents=True)
        (root / "not parquet" / folder / "rows.parquet").write_bytes(b"PAR1 no")
        (root / "bytes" / folder).mkdir(parents=True)
        (root / "bytes" / folder / "rows.jsonl").write_bytes(bytes([255, 254, 0, 1, 200, 129]) * 40)
    same = [{"question": "Is it?", "response_chosen": "Yes.", "response_rejected": "Yes."}] * 4
    write_lines(root / "one class" / "rm", same)
    rules = "def words(completions, **kwargs):\n    return [1.0]\nnumber = 7\n"
    (root / "rules.py").write_text(rules)
    (root / "broken.py").write_text("def words(:\n")
    (root / "questions.txt").write_text("Is it?\n")
    (root / "float32.json").write_text('{"zero_optimization": {"stage": 2}}')
    (root / "cut.json").write_text('{"zero_optimization": {"stage": ')
    return root


# stage or script -> rows of: what is wrong (flags; {house}, {llama}, {out} are filled in), what the message names
EVERY_STAGE = [
    (("--lora_rnk", 4), "--lora_rnk: did you mean --lora_rank?"),
    (("stray",), "stray"),
    (("--model_name_or_path", "{house}/missing"), "{house}/missing"),
    (("--model_name_or_path", "{house}/empty"), "{house}/empty"),
    (("--model_name_or_path", "{house}/adapter"), "merge it first"),
    (("--model_name_or_path", "{house}/broken config"), "broken config"),
    (("--model_name_or_path", "{house}/unknown type"), "lama5"),
    (("--model_name_or_path", "{house}/no tokenizer"), "no tokenizer"),
    (("--model_name_or_path", "{house}/no weights"), "no weights"),
    (("--model_name_or_path", "{house}/half weights"), "half weights"),
    (("--model_name_or_path", "{house}/other sizes"), "have other sizes than its config.json says"),
    (("--model_name_or_path", ""), "--model_name_or_path"),
    (("--train_file_dir", "{house}/missing"), "no such folder"),
    (("--train_file_dir", "{house}/empty"), "{house}/empty"),
    (("--train_file_dir", "{house}/cut/{stage}"), "rows.jsonl:9: not"),
    (("--train_file_dir", "{house}/wrong form/{stage}"), "rows.jsonl:9"),
    (("--train_file_dir", "{house}/number/{stage}"), "rows.jsonl:9"),
    (("--train_file_dir", "{house}/no lines/{stage}"), "no lines/{stage}"),
    (("--train_file_dir", "{house}/pictures/{stage}"), "pictures/{stage}"),
    (("--train_file_dir", "{house}/cut gz/{stage}"), "rows.jsonl.gz"),
    (("--train_file_dir", "{house}/not parquet/{stage}"), "rows.parquet"),
    (("--train_file_dir", "{house}/bytes/{stage}"), "rows.jsonl"),
    (("--train_file_dir", "{house}/empty:x"), "empty:x"),
    (("--validation_file_dir", "{house}/missing"), "no such folder"),
    (("--output_dir", "{house}/a file"), "{house}/a file"),
    (("--output_dir", "{house}/another model"), "holds a model that no run here has left (model.safetensors)"),
    (("--output_dir", "{house}/another model", "--fresh"), "holds a model that no run here has left"),
    (("--output_dir", "{house}/another adapter"), "holds an adapter that no run here has left"),
    (("--output_dir", "{house}/a file/out"), "a file is a file"),
    (("--train_file_dir", "{house}/cut", "--output_dir", "{house}/cut/out"), "lies in {house}/cut"),
    (("--validation_file_dir", "{house}/empty", "--output_dir", "{house}/empty"), "lies in {house}/empty"),
    (("--output_dir", ""), "--output_dir"),
    (("--lora_rank", 0), "--lora_rank"),
    (("--lora_rank", "eight"), "--lora_rank"),
    (("--lora_dropout", 1.5), "--lora_dropout"),
    (("--target_modules", "nothing_of_that_name"), "--target_modules"),
    (("--target_modules", ""), "--target_modules"),
    (("--modules_to_save", "nothing_of_that_name"), "--modules_to_save"),
    (("--peft_path", "{house}/missing"), "--peft_path"),
    (("--peft_path", "{house}/half adapter"), "half adapter"),
    (("--learning_rate", -1), "--learning_rate"),
    (("--learning_rate", "nan"), "--learning_rate"),
    (("--seed", -1), "--seed"),
    (("--weight_decay", -1), "--weight_decay"),
    (("--adam_beta1", 1), "--adam_beta1"),
    (("--adam_epsilon", -1), "--adam_epsilon"),
    (("--model_name_or_path", "{house}/other weights", "--output_dir", "{house}/other weights"), "of the base model"),
    (("--model_name_or_path", "{house}/both"), "holds a whole model and an adapter"),
    (("--num_train_epochs", -1), "--num_train_epochs"),
    (("--save_steps", -5), "--save_steps"),
    (("--logging_steps", -5), "--logging_steps"),
    (("--max_train_samples", 0), "--max_train_samples"),
    (("--max_eval_samples", -2), "--max_eval_samples"),
    (("--lr_scheduler_type", "cosin"), "cosin"),
    (("--lr_scheduler_type", "cosine_with_min_lr"), "--lr_scheduler_kwargs"),
    (("--optim", "grokadamw"), "--optim grokadamw"),
    (("--dtype", "float8"), "float8"),
    (("--precision", "fp8"), "fp8"),
    (("--precision", "fp32", "--bf16"), "--precision"),
    (("--fp16", "--bf16"), "--bf16 and --fp16 contradict"),
    (("--max_steps", -5), "--max_steps"),
    (("--load_in_4bit", "--load_in_8bit"), "--load_in_8bit"),
    (("--load_in_4bit", "--use_peft", "False"), "--use_peft"),
    (("--use_peft", "False", "--peft_path", "{house}/adapter"), "--peft_path"),
    (("--do_train", "False", "--do_eval", "False"), "--do_eval"),
    (("--dataloader_drop_last",), "--dataloader_drop_last"),
    (("--bad_records", "ignore"), "--bad_records"),
    (("--preview", -1), "--preview"),
    (("--report_to", "paper"), "--report_to paper is unknown"),
    (("--deepspeed", "{house}/missing"), "--deepspeed"),
    (("--deepspeed", ROOT / "scripts/zero2.json"), "--deepspeed"),
    (("--deepspeed", "{house}/float32.json", "--bf16"), "--deepspeed"),  # how, if it is installed: test_sharded.py
    (("--deepspeed", "{house}/cut.json"), "--deepspeed"),
    (("--fsdp", "full_shard"), "--fsdp"),
    (("--report_to", "comet_ml"), "--report_to comet_ml is not installed"),
    (("--validation_split_percentage", 150), "--validation_split_percentage"),
    (("--validation_split_count", 0), "--validation_split_count"),
    (("--resume_from_checkpoint", "{house}/missing"), "--resume_from_checkpoint"),
    (("--model_name_or_path", "{house}/no eos"), "no eos"),
    (("--save_strategy", "best"), "--save_strategy best"),
    (("--label_names", "foo"), "--label_names"),
    (("--data_seed", -1), "--data_seed"),
    (("--warmup_ratio", 1), "--warmup_ratio is 1, expected a share of the steps"),
    (("--accelerator_config", '{{"split_batches": true}}'), "split_batches"),
    (("--accelerator_config", '{{"dispatch_batches": true}}'), "dispatch_batches"),
    (("--save_strategy", "best", "--metric_for_best_model", "loss"), "--save_strategy best saves after evaluations"),
    (("--do_eval", "False", "--eval_strategy", "steps"), "--do_eval False and --eval_strategy steps"),
    (("--eval_accumulation_steps", 0), "--eval_accumulation_steps"),
    *[((flag, "inf"), flag) for flag in ("--num_train_epochs", "--logging_steps", "--save_steps", "--warmup_steps")],
    (("--eval_delay", "nan"), "--eval_delay"),
    (("--neftune_noise_alpha", -5), "--neftune_noise_alpha"),
    (("--dataloader_num_workers", -1), "--dataloader_num_workers"),
    (("--dataloader_prefetch_factor", 0, "--dataloader_num_workers", 1), "--dataloader_prefetch_factor"),
    (("--gradient_checkpointing", "--activation_checkpointing_kwargs", '{{"foo": 1}}'), "foo is unknown, expected"),
    (("--activation_checkpointing", "--activation_checkpointing_kwargs", "[]"), "_kwargs [] is not a file"),
    (("--lr_scheduler_kwargs", "{{'num_cycles': 1}}"), "--lr_scheduler_kwargs"),
    (("--train_file_dir", ","), "names no folder of records"),
    (("--dataloader_persistent_workers",), "--dataloader_num_workers"),
    (("--dataloader_multiprocessing_context", "spawn"), "--dataloader_num_workers"),
    (("--accelerator_config", '{{"foo": 1}}'), "--accelerator_config: foo is unknown, expected dispatch_batches,"),
    (("--accelerator_config", "{house}/missing.json"), "--accelerator_config {house}/missing.json is not a file"),
    (
        ("--accelerator_config", '{{"gradient_accumulation_kwargs": {{"num_steps": 4}}}}'),
        "--gradient_accumulation_steps",
    ),
]
ONE_STAGE = {
    "pt": [
        (("--model_name_or_path", "{house}/no output layer"), "lacks the weights of lm_head.weight"),
        (("--block_size", "many"), "--block_size"),
        (("--block_size", 0), "--block_size"),
        (("--block_size", 5000), "--block_size"),
        (("--per_device_train_batch_size", 0), "--per_device_train_batch_size"),
        (("--gradient_accumulation_steps", 0), "--gradient_accumulation_steps"),
    ],
    "sft": [
        (("--model_name_or_path", "{house}/rm whole"), "LlamaForSequenceClassification, which scores"),
        (("--model_name_or_path", "{house}/other weights", "--peft_path", "{house}/adapter"), "is not the base of"),
        (("--peft_path", "{house}/rm"), "is a SEQ_CLS adapter, and this stage trains CAUSAL_LM"),
        (("--max_steps", 0), "--max_steps"),
        (("--model_name_or_path", "{house}/broken template"), "chat template"),
        (("--max_source_length", 0), "--max_source_length"),
        (("--max_target_length", -1), "--max_target_length"),
        (("--max_source_length", 4000, "--max_target_length", 4000), "positions"),
        (("--packing", "--packing_length", 0), "--packing_length"),
        (("--use_liger_kernel",), "liger-kernel"),
        (("--use_fast_tokenizer", "False", "--packing_length", "x"), "--packing_length"),
        (("--per_device_eval_batch_size", 0), "--per_device_eval_batch_size"),
        (("--packing_length", 512), "--packing"),
        (("--train_sampling_strategy", "lenght"), "invalid choice: 'lenght' (choose from 'random', 'sequential'"),
        (("--label_names", "labels", "weights"), "--label_names"),
        (("--metric_for_best_model", "accuracy"), "accuracy cannot tell the best checkpoint of this stage"),
        (("--metric_for_best_model", "runtime"), "--metric_for_best_model runtime"),
    ],
    "rm": [
        (("--peft_path", "{house}/adapter"), "is a CAUSAL_LM adapter, and this stage trains SEQ_CLS"),
        (("--peft_path", "{house}/rm of no task"), '"task_type": "SEQ_CLS"'),
        (("--train_file_dir", "{house}/one class/rm"), "the same"),
        (("--train_sampling_strategy", "lenght"), "invalid choice: 'lenght' (choose from 'random', 'sequential'"),
        (("--pad_token", "<|endoftext|>"), "--tokenizer_name_or_path"),
        (("--eos_token", "<|endoftext|>"), "--tokenizer_name_or_path"),
        (("--chat_template_path", "{house}/rm"), "--tokenizer_name_or_path"),
        (("--model_init_kwargs", '{{"attn_implementation": "eager"}}'), "--attn_implementation"),
        (("--dataset_num_proc", 2), "--preprocessing_num_workers"),
        (("--center_rewards_coefficient", -1), "--center_rewards_coefficient"),
        (("--activation_offloading", "--use_cpu"), "--activation_offloading"),
        (("--metric_for_best_model", "accurracy"), "eval_accuracy_*"),
        (
            ("--metric_for_best_model", "accuracy_kind", "--eval_steps", 1),
            "accuracy_kind: no held-out pair",
        ),
        (("--model_name_or_path", "{house}/broken template"), "chat template"),
        (("--max_source_length", 4000, "--max_target_length", 4000), "positions"),
    ],
    "rl": [
        (("--model_name_or_path", "{house}/rm whole"), "LlamaForSequenceClassification, which scores"),
        (("--reward_model_name_or_path", ""), "--reward_model_name_or_path is missing"),
        (("--reward_model_name_or_path", "{llama}"), "has no score head"),
        (("--reward_model_name_or_path", "{llama}", "--plan"), "has no score head"),
        (("--reward_model_name_or_path", "{house}/two labels"), "expected one label"),
        (("--reward_model_name_or_path", "{house}/two labels", "--plan"), "expected one label"),
        (("--reward_model_name_or_path", "{house}/adapter"), "not a reward model"),
        (("--reward_model_name_or_path", "{house}/missing"), "--reward_model_name_or_path {house}/missing: no such"),
        (("--reward_model_name_or_path", "{house}/missing", "--plan"), "path {house}/missing: no such folder"),
        (("--reward_model_name_or_path", "{house}/rm without head"), "holds no score head"),
        (("--reward_model_name_or_path", "{house}/rm without head", "--use_peft", "False"), "holds no score head"),
        (("--reward_model_name_or_path", "{house}/whole without head"), "lacks the weights of score.weight"),
        (("--reward_functions", "{house}/missing.py:words"), "missing.py"),
        (("--reward_functions", "{house}/broken.py:words"), "broken.py"),
        (("--reward_functions", "{house}/rules.py:sentences"), "sentences"),
        (("--reward_functions", "{house}/rules.py:number"), "number"),
        (("--reward_functions", "{house}/rules.py"), "--reward_functions"),
        (("--reward_weights", "one"), "--reward_weights"),
        (("--temperature", "inf"), "--temperature"),
        (("--target_kl", "nan"), "--target_kl"),
        (("--min_target_length", -1), "--min_target_length"),
        (("--reward_weights", "nan"), "--reward_weights"),
        (("--init_kl_coef", -1), "--init_kl_coef"),
        (("--value_coef", "nan"), "--value_coef"),
        (("--critic_warmup", -1), "--critic_warmup"),
        (("--reward_baseline", "inf"), "--reward_baseline"),
        (("--missing_eos_penalty", "nan"), "--missing_eos_penalty"),
        (("--reward_weights", "1,2,3"), "--reward_weights"),
        (("--model_name_or_path", "{house}/broken template"), "chat template"),
        (("--batch_size", 4, "--mini_batch_size", 3), "--batch_size 4"),
        (("--batch_size", 0), "--batch_size"),
        (("--micro_batch_size", 0), "--micro_batch_size"),
        (("--ppo_epochs", 0), "--ppo_epochs"),
        (("--max_steps", 0), "--max_steps"),
        (("--save_steps", "nan"), "--save_steps"),
        (("--logging_steps", -5), "--logging_steps"),
        (("--temperature", 0), "--temperature"),
        (("--gamma", 1.5), "--gamma"),
        (("--gae_lambda", -1), "--gae_lambda"),
        (("--clip_range", 0), "--clip_range"),
        (("--min_target_length", 20, "--max_target_length", 8), "--min_target_length"),
        (("--max_source_length", 4000, "--max_target_length", 4000), "positions"),
        (("--kl_estimator", "k4"), "--kl_estimator"),
        (("--critic_learning_rate", 0), "--critic_learning_rate"),
        (("--kl_target", 0), "--kl_target"),
        (("--reward_model_name_or_path", "{house}/broken adapter config"), "broken adapter config"),
        (("--critic", "none"), "--critic"),
        (("--guard_length", 0.5), "--guard_length"),
        (("--guard_kl", "nan"), "--guard_kl"),
        (("--guard_eos", 25), "--guard_eos"),
        (("--reward_model_name_or_path", "{house}/adapter of nothing"), "adapter of nothing"),
        (("--reward_model_name_or_path", "{house}/damaged base"), "damaged base/base.json"),
    ],
}
MERGES = [
    ("{llama}", "{house}/adapter", "", (), "--output_dir is missing"),
    ("{llama}", "", "{out}", (), "--peft_model_path is missing"),
    ("{llama}", "{house}/missing", "{out}", (), "holds no adapter_config.json"),
    ("{llama}", "{house}/broken adapter config", "{out}", (), "broken adapter config"),
    ("{llama}", "{house}/half adapter", "{out}", (), "half adapter"),
    ("{llama}", "{house}/no adapter weights", "{out}", (), "no adapter weights"),
    ("{llama}", "{house}/damaged base", "{out}", (), "damaged base/base.json"),
    ("{house}/missing", "{house}/adapter", "{out}", (), "{house}/missing"),
    ("{house}/adapter", "{house}/adapter", "{out}", (), "merge it first"),
    ("{house}/half weights", "{house}/adapter", "{out}", (), "half weights"),
    ("{house}/other weights", "{house}/adapter", "{out}", (), "is not the base of"),
    ("{bloom}", "{house}/adapter", "{out}", (), "it is a bloom, the training was on a llama"),
    ("{bloom}", "{house}/adapter", "{out}", ("--force",), "is not an adapter of this base"),
    ("{llama}", "{house}/adapter", "{house}/a file", (), "a file"),
    ("{llama}", "{house}/adapter", "{house}/rm", (), "rm holds another adapter"),
    ("{llama}", "{house}/adapter", "{out}", ("--push_to_hub", "no name"), "--push_to_hub no name"),
    ("{llama}", "{house}/adapter", "{out}", ("--dtype", "int8"), "int8"),
    ("{llama}", "{house}/adapter", "{out}", ("--max_shard_size", "big"), "--max_shard_size"),
]
QUESTIONS = "--data_file", "{house}/questions.txt"
INFERENCE = [
    ((), "--base_model is missing"),
    (("--base_model", "{house}/missing", "--data_file", "{house}/questions.txt"), "{house}/missing"),
    (("--base_model", "{llama}", "--data_file", "{house}/missing.txt"), "missing.txt"),
    (
        ("--base_model", "{llama}", "--lora_model", "{house}/missing", "--data_file", "{house}/questions.txt"),
        "missing",
    ),
    (
        ("--base_model", "{llama}", "--lora_model", "{house}/broken adapter config", *QUESTIONS),
        "broken adapter config",
    ),
    (("--base_model", "{house}/whole without head", *QUESTIONS), "LlamaForSequenceClassification, which scores"),
    *(
        (("--base_model", "{llama}", "--lora_model", f"{{house}}/{name}", *QUESTIONS), message)
        for name, message in (
            ("half adapter", "half adapter holds no whole adapter weights"),
            ("no adapter weights", "no adapter weights lacks adapter_model.safetensors"),
            ("empty adapter", "empty adapter: its file of weights is empty"),
            ("empty bin", "empty bin holds no whole adapter weights"),
            ("grown adapter", "merge it (merge_peft_adapter.py)"),
            ("adapter of another rank", "adapter of another rank is not an adapter for {llama}"),
        )
    ),
    (("--compare", "{llama}", "--reward_model", "{llama}", *QUESTIONS), "error: --reward_model {llama} is a ["),
    (("--compare", "{llama}", "--reward_model", "{house}/rm of another rank", *QUESTIONS), "rank cannot be loaded"),
    (("--compare", "{llama}", "--reward_model", "{house}/half adapter", *QUESTIONS), "error: --reward_model {house}"),
    (("--base_model", "{llama}", "--dtype", "float8", *QUESTIONS), "choose from"),
    (("--base_model", "{llama}", "--max_new_tokens", 1024, *QUESTIONS), "has 1024 positions"),
    (
        ("--compare", "{llama}", *QUESTIONS, "--predictions_file", "{house}/questions.txt"),
        "holds something else than compared answers",
    ),
    (("--base_model", "{house}/both", *QUESTIONS), "holds a whole model and an adapter"),
    (("--base_model", "{llama}", "--lora_model", "{house}/rm", "--data_file", "{house}/questions.txt"), "rm"),
    (("--base_model", "{llama}", "--data_file", "{house}/questions.txt", "--max_new_tokens", 0), "--max_new_tokens"),
    (("--base_model", "{llama}", "--data_file", "{house}/questions.txt", "--temperature", -1), "--temperature"),
    (("--base_model", "{llama}", "--data_file", "{house}/questions.txt", "--top_p", 2), "--top_p"),
    (("--compare", "{llama}"), "--data_file"),
    (("--base_model", "{llama}", "--reward_model", "{house}/rm", *QUESTIONS), "--reward_model scores"),
]


def commands(house, tiny, records, output) -> list[tuple[list, str]]:
    """Every wrong command, and what its message must name. Rows of EVERY_STAGE go round the stages."""
    words = {"house": house, "llama": tiny("llama"), "bloom": tiny("bloom"), "out": output}

    def filled(parts, **more):
        return [part.format(**words, **more) if isinstance(part, str) else part for part in parts]

    rows, names = [], list(SCRIPTS)
    for number, (wrong, message) in enumerate(EVERY_STAGE):
        name = names[number % len(names)]
        rows.append((name, wrong, message))
        if wrong[0] in ("--model_name_or_path", "--train_file_dir"):  # what each stage has a way of its own to meet
            rows += [(other, wrong, message) for other in names if other != name]
    rows += [(name, wrong, message) for name, found in ONE_STAGE.items() for wrong, message in found]
    made = []
    for name, wrong, message in rows:
        extra = ("--reward_model_name_or_path", house / "rm") if name == "rl" else ()
        if any(word in wrong for word in ("--reward_functions",)):
            extra = ()
        command = stage(name, tiny("llama"), records, output, *extra)
        made.append(([*command, *filled(wrong, stage=name)], *filled([message], stage=name)))
    for base, adapter, target, wrong, message in MERGES:
        made.append(([*merge(*filled([base, adapter, target])), *wrong], *filled([message])))
    made += [
        (["inference.py", "--predictions_file", output / "answers.jsonl", *filled(wrong)], *filled([message]))
        for wrong, message in INFERENCE
    ]
    return made


def snapshot(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_errors_end_with_one_message(house, tiny, records, tmp_path):
    output, wrong = tmp_path / "out", []
    table = commands(house, tiny, records, output)
    assert len(table) >= 120
    before = snapshot(house)
    for command, message in table:
        started = time.monotonic()
        try:
            ended = in_process(*command)
            found = (ended.code, len(ended.errors), "Traceback" in ended.stderr, output.exists())
            said = ended.stderr[ended.stderr.find("error:") :]
            if found != (2, 1, False, False) or message not in said or time.monotonic() - started > LONGEST:
                wrong.append((command, message, found, ended.stderr[-400:]))
        except BaseException as error:  # a traceback, for the user
            wrong.append((command, message, repr(error)[:400]))
        shutil.rmtree(output, ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {len(table)}:\n\n" + "\n\n".join(map(str, wrong))
    assert snapshot(house) == before, "something was written into what was read"


def test_error_in_a_process_of_its_own(tmp_path):
    started = time.monotonic()
    ended = in_subprocess("rl_training.py", "--model_name_or_pth", "x", "--output_dir", tmp_path / "out")
    assert ended.code == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert ended.errors == ["error: unknown argument --model_name_or_pth: did you mean --model_name_or_path?"]
    assert not (tmp_path / "out").exists() and time.monotonic() - started < 60


def test_a_tokenizer_loads_from_the_broken_template(house):
    """The folders are broken in the way that the table says, and in no other."""
    assert AutoTokenizer.from_pretrained(house / "broken template").eos_token == "<|im_end|>"
