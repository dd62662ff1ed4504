"""Which rewards: a reward model, Python functions, and their weights."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from loguru import logger
from peft import TaskType
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.hub import cached_file

from arguments.adapter import saved_tensors, with_saved_adapter
from arguments.atomic import read_json
from arguments.base import BASE_FILE, adapter_config, adapter_folder, tokenizer_folder
from arguments.command_line import UserError, not_found
from arguments.encoding import LengthArguments, known_ids
from arguments.model import ModelArguments, keep_unpacked, pad_candidate
from arguments.reward_functions import load_functions
from arguments.shapes import only_shapes

RESERVED = ("std", "length")  # reward_std and reward_length are figures of all sources together
HEADS = ("score", "classifier")  # what transformers calls the layer that gives the score


@dataclass
class RewardSourceArguments:
    """Where an answer's score comes from: the weighted sum of a reward model's and of Python functions' scores."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Output folder of stage 3, or any sequence classification model."}
    )
    reward_functions: str | None = field(
        default=None,
        metadata={
            "help": "path/to/file.py:name[,name...]: functions(prompts, completions, **columns) that return a number "
            "(or None) for each completion, as in trl."
        },
    )
    reward_weights: str | None = field(
        default=None, metadata={"help": "Comma list: of the reward model, if there is one, then of each function."}
    )

    def __post_init__(self):
        if not (self.reward_model_name_or_path or self.reward_functions):
            raise UserError(
                "--reward_model_name_or_path is missing: name the output folder of the reward stage, "
                "or --reward_functions"
            )
        self.weights()  # fails now, not after the models are loaded
        self.functions = load_functions(self.reward_functions) if self.reward_functions else {}

    def find_adapter(self) -> Path | None:
        """The folder of the reward adapter at reward_model_name_or_path; None if there is none."""
        path = self.reward_model_name_or_path
        if not path or (folder := adapter_folder(path)) is None:
            return None
        config = adapter_config(folder)
        if config.task_type != TaskType.SEQ_CLS:
            raise UserError(
                f"--reward_model_name_or_path {path} is a {config.task_type} adapter, not a reward model: train one"
            )
        if not config.base_model_name_or_path:
            raise UserError(
                f"{folder}/adapter_config.json does not say which base it was trained on: name it there, as "
                "base_model_name_or_path"
            )
        return folder

    def check_output(self, output_dir: str) -> None:
        """Refuse to write the policy over the reward model."""
        path, output = self.reward_model_name_or_path, Path(output_dir).resolve()
        adapter = self.find_adapter()
        folders = [folder.resolve() for folder in (path and Path(path), adapter) if folder]
        if output in [*folders, *(folder.parent for folder in folders if folder.name == "adapter")]:
            raise UserError(f"--output_dir {output_dir} is the folder of the reward model: name another one")

    def load_model(self, lengths: LengthArguments, model_args: ModelArguments) -> "RewardModel":
        """The reward model with its own weights, tokenizer and template; for --plan without its weights.

        Raises:
            UserError: when there is none, it has no head of one label, or that head holds no trained weights.
        """
        path, adapter = self.reward_model_name_or_path, self.find_adapter()
        source = adapter_config(adapter).base_model_name_or_path if adapter else path
        kwargs, weights = model_args.hub_kwargs, model_args.weights_in_memory()
        if weights["quantization_config"]:
            weights["quantization_config"].llm_int8_skip_modules = list(HEADS)
        try:
            config = AutoConfig.from_pretrained(source, **kwargs)
            if not adapter:
                self._check_head(config)
            config.num_labels, missing = 1, []
            if only_shapes():
                code = {"trust_remote_code": model_args.trust_remote_code}
                model = AutoModelForSequenceClassification.from_config(config, dtype=weights["dtype"], **code)
            else:
                with without_load_report() if adapter else nullcontext():
                    model, loading = AutoModelForSequenceClassification.from_pretrained(
                        source, config=config, output_loading_info=True, **weights, **kwargs
                    )
                missing = loading["missing_keys"]
            beside = tokenizer_folder(adapter) if adapter else path
            tokenizer = AutoTokenizer.from_pretrained(beside or source, **kwargs)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            base = f" is an adapter on {source}" if adapter else ""
            raise UserError(f"--reward_model_name_or_path {path}{base}: {not_found(source, error)}") from error
        if missing and not adapter:
            missing = ", ".join(sorted(missing))
            raise UserError(
                f"--reward_model_name_or_path {path} lacks the weights of {missing}: nobody trained that score head, "
                "its rewards would be random"
            )
        keep_unpacked(model)
        pad_alike(model.config.get_text_config(), tokenizer, first="tokenizer" if adapter else "config")
        if adapter:
            adapter_head(adapter)
            model = with_saved_adapter(model, adapter, "default", trainable=False)
        return RewardModel(model, tokenizer, lengths, is_own(adapter or path, model_args.cache_dir))

    def _check_head(self, config) -> None:
        """See that a whole model scores: its config names a classifier of one label."""
        path, kinds = self.reward_model_name_or_path, config.architectures or []
        if not any("SequenceClassification" in name for name in kinds):
            raise UserError(f"--reward_model_name_or_path {path} is a {kinds}, which has no score head")
        if config.num_labels != 1:
            raise UserError(
                f"--reward_model_name_or_path {path} tells {config.num_labels} labels apart (id2label in its "
                "config.json), expected one label: a score"
            )

    def weights(self) -> dict[str, float]:
        """Weight of each source by name: model, then the functions; 1 each unless --reward_weights says otherwise."""
        names = [name.strip() for name in (self.reward_functions or ":").rpartition(":")[2].split(",") if name.strip()]
        names = (["model"] if self.reward_model_name_or_path else []) + names
        taken = {name for name in names if names.count(name) > 1 or (len(names) > 1 and name in RESERVED)}
        if taken:
            raise UserError(
                f"--reward_functions names {', '.join(sorted(taken))}: expected each once and, as they are logged as "
                "reward_<name>, none of model, std and length beside other sources; give it another name"
            )
        try:
            values = [float(x) for x in self.reward_weights.split(",")] if self.reward_weights else [1.0] * len(names)
        except ValueError as error:
            raise UserError(f"--reward_weights {self.reward_weights}: expected a comma list of numbers") from error
        if not all(map(math.isfinite, values)):
            raise UserError(f"--reward_weights {self.reward_weights}: expected finite numbers")
        if len(values) != len(names):
            raise UserError(
                f"--reward_weights holds {len(values)} numbers for {len(names)} sources: {', '.join(names)}"
            )
        return dict(zip(names, values, strict=True))


@contextmanager
def without_load_report():
    """Inside, transformers does not tell that a base has no score head: the adapter brings it."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def is_own(source: str | Path, cache_dir: str | None = None) -> bool:
    """Whether stage 3 trained a reward model: an adapter, a whole model, or one merged here, also if from the hub.

    It reads the score at the answer's end token. Elsewhere it is read behind all that the template makes of a
    conversation, in ChatML a line break later. Trained so in 30 steps on the sample (one seed), 93% of the held-out
    pairs were right, not 100%, and PPO learned not to end answers, as those without an end scored higher.
    """

    def file(name):  # without an error where there is none, or no connection
        kinds = "missing_entries", "connection_errors", "gated_repo"
        quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
        return cached_file(str(source), name, cache_dir=cache_dir, **quiet)

    if merged := file("merge.json"):
        return (read_json(Path(merged)) or {}).get("trained_here", True)
    return bool(file(BASE_FILE) or file("run.json"))


def adapter_head(adapter: Path) -> dict[str, torch.Tensor]:
    """The trained score head of a reward adapter, by the names of its parameters; {} for --plan.

    Raises:
        UserError: when the adapter was saved without one.
    """
    if only_shapes():
        return {}
    tensors = saved_tensors(adapter)
    found = {k.rpartition(".")[2]: v for k, v in tensors.items() if set(HEADS) & set(k.split("."))}
    if not found:
        raise UserError(f"{adapter} holds no score head, its rewards would be random: train it with stage 3")
    return found


def pad_alike(config, tokenizer, first: str) -> None:
    """Let model and tokenizer pad with the same token: a decoder's score is read just before the padding.

    If they differ, `first` decides: the config of a whole model was saved with its weights, but that of an adapter's
    base knows nothing of the tokenizer that the adapter was trained with.
    """
    known = [config.pad_token_id, tokenizer.pad_token_id]
    usable = [pad for pad in known if pad is not None and 0 <= pad < min(len(tokenizer), config.vocab_size)]
    if not usable:
        usable = [tokenizer.convert_tokens_to_ids(pad_candidate(tokenizer, config.vocab_size))]
    config.pad_token_id = usable[0] if first == "config" else usable[-1]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)


class RewardModel(nn.Module):
    """A separate reward model, which reads conversations as text with its own tokenizer and template.

    One that stage 3 trained (`own`) reads them as it did there, another as its template has them.
    """

    def __init__(self, model: nn.Module, tokenizer, lengths: LengthArguments, own: bool = False):
        super().__init__()
        self.model, self.tokenizer, self.own = model, tokenizer, own
        # an answer's limit is in the policy's tokens: in another vocabulary a whole answer may have more
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # ALiBi has none
        self.positions = positions = known or max(8192, lengths.longest)
        tokenizer.embedding_rows = model.config.get_text_config().vocab_size
        source = min(lengths.max_source_length, positions - lengths.max_target_length)
        if tokenizer.chat_template and source < 1:
            raise UserError(
                f"the reward model has {positions} positions, too few for an answer of {lengths.max_target_length} "
                "tokens: limit the answers, or take another reward model"
            )
        if tokenizer.chat_template and source < lengths.max_source_length:
            logger.warning(f"The reward model has {positions} positions: it reads {source} tokens of a question")
        self.lengths = replace(lengths, max_source_length=max(source, 1), max_target_length=positions - source)
        tokenizer.padding_side = "right"
        self.requires_grad_(False).eval()

    def encode_own(self, messages: list[dict], finished: bool) -> list[int]:
        """Tokens as stage 3 trains them: up to the answer's end, where the score is read."""
        ids = self.lengths.encode(self.tokenizer, messages)["input_ids"]
        return ids if finished else ids[:-1]

    def forward(self, conversations: list[list[dict]], finished: list[bool] | None = None):
        """Scores [batch] of conversations that end with an answer, in float32.

        An answer that is not `finished` gets no end token, like one that was cut in training.
        """
        device = next(self.model.parameters()).device
        if self.tokenizer.chat_template:
            encode = self.encode_own if self.own else partial(self.lengths.encode_templated, self.tokenizer)
            ended = zip(conversations, finished or [True] * len(conversations), strict=True)
            try:
                rows = [known_ids(self.tokenizer, encode(messages, ends)) for messages, ends in ended]
            except UserError as error:  # not the policy's template or tokenizer
                raise UserError(f"the reward model: {error}") from error
            batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        else:
            prompts = ["\n".join(m["content"] for m in messages[:-1]) for messages in conversations]
            answers = [messages[-1]["content"] for messages in conversations]
            most = min(self.positions, self.tokenizer.model_max_length)
            batch = self.tokenizer(
                prompts, answers, truncation=True, max_length=most, padding=True, return_tensors="pt"
            )
        return self.model(**batch.to(device)).logits[:, 0].float()
