"""Which model: base, tokenizer, dtype, quantisation, attention."""

import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from arguments.attention import attend_in_blocks
from arguments.checkpoints import left_by_a_run
from arguments.command_line import UserError, first_line, not_found
from arguments.shapes import only_shapes

# For base models without a chat template. A turn ends with eos, so that the model learns to stop.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)

PRODUCTS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class ModelArguments:
    """The base model of a stage and its tokenizer."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Folder or hub name of the base model. Required: there is no hidden default."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "bloom, llama, qwen3 ...: only compared with the model's config; auto says nothing."},
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "If not the model's own."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Frozen weights in memory: auto (what the matrix products of --precision take; PPO on a CPU: "
            "float32), bfloat16, float16, float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit frozen weights (needs bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit NF4 frozen weights (needs bitsandbytes)."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa (what transformers takes where a model has it), eager, flash_attention_2 ..."},
    )
    device_map: str | None = field(
        default=None, metadata={"help": "auto spreads one model over the GPUs of one process."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where hub downloads are kept."})
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "For old command lines: transformers 5 has fast tokenizers only."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. The 2023 scripts did so unasked."}
    )

    def __post_init__(self):
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is missing: name the folder or hub id of the base model")
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit: choose one of them")
        if not self.use_fast_tokenizer:
            logger.warning("--use_fast_tokenizer False has no effect: transformers 5 has fast tokenizers only")

    @property
    def hub_kwargs(self) -> dict:
        return {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}

    def load_config(self):
        """The base model's config.

        Raises:
            UserError: when there is no such model, or its folder also has an adapter, which transformers would apply.
        """
        folder = Path(self.model_name_or_path)
        adapter = folder / "adapter_config.json"
        if (folder / "config.json").is_file() and adapter.is_file():
            raise UserError(
                f"{folder} holds a whole model and an adapter, which transformers would add to it once more: move "
                f"adapter_config.json and adapter_model.* into {folder / 'adapter'}"
            )
        try:
            return AutoConfig.from_pretrained(self.model_name_or_path, **self.hub_kwargs)
        except (OSError, ValueError) as error:
            hint = " It holds an adapter: merge it first with merge_peft_adapter.py." if adapter.exists() else ""
            why = not_found(self.model_name_or_path, error)
            raise UserError(f"{self.model_name_or_path} is not a model: {why}{hint}") from error

    def check(self, longest: int, trains_all: bool, output_dir: str) -> None:
        """Check, before anything is loaded, that this model can be trained on rows of `longest` tokens.

        Raises:
            UserError: when it has fewer positions, when `trains_all` meets quantised weights, or when what is trained
                would be written into its own folder or beside another model, on which it would then be loaded.
        """
        output = Path(output_dir)
        if output.resolve() == Path(self.model_name_or_path).resolve():
            raise UserError(f"--output_dir {output_dir} is the folder of the base model: name another one")
        models = [path.name for form in ("model*.safetensors", "pytorch_model*.bin") for path in output.glob(form)]
        if models and not left_by_a_run(output):
            raise UserError(
                f"--output_dir {output_dir} holds a model that no run here has left ({models[0]}): name another one"
            )
        if trains_all and (self.load_in_4bit or self.load_in_8bit):
            raise UserError("--use_peft False trains all weights, which --load_in_4bit and --load_in_8bit freeze")
        kind = self.load_config().model_type
        if self.model_type not in (None, "auto", kind):
            logger.warning(f"--model_type {self.model_type}, but the config says {kind}: going by the config")
        positions = self.positions()
        if positions and longest > positions:
            raise UserError(
                f"{self.model_name_or_path} has {positions} positions, and rows may have {longest} tokens: lower "
                "--block_size, or --max_source_length and --max_target_length"
            )

    def check_scores(self) -> None:
        """Check, before anything is loaded, that a reward model can be made of this base.

        Raises:
            UserError: when neither transformers nor the model's own code has a class for one.
        """
        config = self.load_config()
        own = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
        if not own and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"{self.model_name_or_path}: transformers has no reward model (...ForSequenceClassification) for "
                f"{config.model_type}. Train the reward model on a base of another family, which RL loads beside the "
                "policy, or score in RL with --reward_functions"
            )

    def positions(self) -> int | None:
        """How many tokens a row of the base model may have; None where it sets no limit, as with ALiBi."""
        return getattr(self.load_config().get_text_config(), "max_position_embeddings", None)

    def longest_question(self, wanted: int, answer: int) -> int:
        """Tokens of a question, at most `wanted`, that leave the model positions for an answer of `answer` tokens.

        Raises:
            UserError: when the answer alone has more tokens than the model has positions.
        """
        room = (self.positions() or wanted + answer) - answer
        if room < 1:
            raise UserError(
                f"{self.model_name_or_path} has {self.positions()} positions: --max_new_tokens {answer} leaves none "
                "for a question"
            )
        return min(wanted, room)

    def resolve_dtype(self, precision: str, trains_all: bool) -> None:
        """Resolve --dtype auto: float32 for trained weights, what the products of `precision` take for frozen ones."""
        if self.dtype in (None, "auto"):
            self.dtype = "float32" if trains_all else PRODUCTS[precision]
        if self.dtype == "float16" and not torch.cuda.is_available():
            logger.warning("float16 weights need a GPU: using float32")
            self.dtype = "float32"

    def load_tokenizer(self):
        """The tokenizer, with a chat template and, if its vocabulary has one, a pad token other than eos."""
        source = self.tokenizer_name_or_path or self.model_name_or_path
        config = self.load_config()
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **self.hub_kwargs)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer in {source}: {first_line(error)}") from error
        tokenizer.padding_side = "right"
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer in {source} has no eos token: answers could never end")
        if tokenizer.chat_template is None:
            begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # as its model's texts began
            tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN_CHAT_TEMPLATE
            logger.info("The tokenizer has no chat template: using the plain User/Assistant one")
        rows = config.get_text_config().vocab_size
        # a pad token that was added without resizing the model would be looked up behind its last row
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token_id >= rows:
            tokenizer.pad_token = pad_candidate(tokenizer, rows)
        tokenizer.embedding_rows = rows  # for arguments.encoding
        return tokenizer

    def load_model(self, auto_class, num_labels: int | None = None):
        """`auto_class.from_pretrained` of the base model, in the dtype and quantisation asked for.

        With `num_labels` a reward model, whose head may be new. For --plan the model as its config describes it.

        Raises:
            UserError: when it cannot be loaded, or would answer by random weights: a reward model has no output layer.
        """
        config, scores = self.load_config(), num_labels is not None
        if scores:
            self.check_scores()
            config.num_labels, config.problem_type = num_labels, "regression"  # else vLLM takes a sigmoid
        scorers = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
        if scorers and not scores:  # with tied embeddings no weight of a language model is missing
            raise UserError(
                f"{self.model_name_or_path} is a {scorers[0]}, which scores texts and writes none: name a causal "
                "language model"
            )
        weights = self.weights_in_memory()
        attend_in_blocks()
        try:
            if only_shapes():
                plain = self.attn_implementation if self.attn_implementation in ("eager", "sdpa") else None
                settings = {"attn_implementation": plain, "trust_remote_code": self.trust_remote_code}
                return auto_class.from_config(config, dtype=weights["dtype"], **settings)
            model, found = auto_class.from_pretrained(
                self.model_name_or_path,
                output_loading_info=True,
                config=config,
                device_map=self._placement(),
                attn_implementation=self.attn_implementation,
                **weights,
                **self.hub_kwargs,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise UserError(f"cannot load {self.model_name_or_path}: {first_line(error)}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise UserError(
                f"{self.model_name_or_path}: its weights have other sizes than its config.json says: copy or download "
                "both again, from one place"
            ) from error
        lacking = set() if scores else found["missing_keys"] & {name for name, _ in model.named_parameters()}
        if lacking:
            kind, names = " or ".join(config.architectures or ["model"]), ", ".join(sorted(lacking)[:3])
            raise UserError(
                f"{self.model_name_or_path} is a {kind} and lacks the weights of {names}, which would be random: name "
                "a causal language model"
            )
        keep_unpacked(model)
        parameters = model.num_parameters() or count_parameters(model.parameters())  # ZeRO-3: 0
        logger.info(
            f"Loaded {self.model_name_or_path}: {config.model_type}, {parameters:,} parameters, {weights['dtype']}"
        )
        return model

    def _placement(self) -> str | None:
        """--device_map, unless there are several processes: each of those has a GPU of its own."""
        if self.device_map and "LOCAL_RANK" in os.environ:  # torchrun with one process, too: accelerate refuses it
            logger.warning(f"--device_map {self.device_map} has no effect with a process per GPU")
            return None
        return self.device_map if torch.cuda.is_available() else None

    def torch_dtype(self) -> torch.dtype:
        """Dtype of the frozen weights in memory, once resolve_dtype has chosen it."""
        return getattr(torch, self.dtype)

    def weights_in_memory(self) -> dict:
        """Arguments of from_pretrained for the dtype and quantisation of frozen weights."""
        dtype, quantization = self.torch_dtype(), None
        if (self.load_in_4bit or self.load_in_8bit) and not only_shapes():  # a plan counts the bits itself
            quantization = BitsAndBytesConfig(
                load_in_4bit=self.load_in_4bit,
                load_in_8bit=self.load_in_8bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        return {"dtype": dtype, "quantization_config": quantization}


@torch.no_grad()
def check_finite(model, tokenizer, instead: str) -> None:
    """Check that a model in float16, which is fast on GPUs before Ampere, does not overflow it.

    Some that were trained in bfloat16 do (Gemma 3): their likelihoods are NaN, and sampling from them fails.

    Raises:
        UserError: when it does, with what to do `instead`.
    """
    if model.dtype != torch.float16:
        return
    ids = torch.tensor([tokenizer("Two and two are four.")["input_ids"]], device=model.device)
    if not model(ids).logits.isfinite().all():
        raise UserError(f"{model.config._name_or_path} overflows float16, which suits this GPU: {instead}")


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold in all; ZeRO-3 empties parameters and notes how many there were in ds_numel."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def keep_unpacked(model) -> None:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights at the first evaluation on a CPU with avx512_bf16.

    They stay repacked, and the product with such weights has no backward pass: silently, no gradient would reach the
    layers below. Models may be stored in 4 bits, so every model is searched for them.
    """
    for layer in model.modules():
        if "support_avx512bf16_for_cpu" in vars(layer):
            layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def keeps_apart(model) -> bool:
    """Whether position_ids alone keep sequences that are laid end to end in a row from seeing each other.

    The model is tested: what comes before a sequence must not change its logits. Models without position_ids (ALiBi,
    recurrent ones) fail.

    Raises:
        UserError: under ZeRO-3, which has split the weights between the ranks.
    """
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "--packing and --isolate_documents test the loaded model, but ZeRO-3 has split it: take "
            "scripts/zero2.json or --fsdp instead"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.arange(3, 15, device=model.device).repeat(2, 1)
    ids[1, :6] += 20
    positions = torch.arange(6, device=model.device).repeat(2, 2)
    training = model.training
    logits = [
        model.eval()(input_ids=row[None], position_ids=positions[:1], use_cache=False).logits[0, 6:] for row in ids
    ]
    model.train(training)
    return alike(*logits)


def alike(found: torch.Tensor, expected: torch.Tensor, within: float = 0.05) -> bool:
    """Whether two results of a model differ by rounding alone, which in a mixture of experts all tokens share.

    What sees too much mostly differs by a third and more.
    """
    found, expected = found.float(), expected.float()  # a norm of large float16 numbers is infinite
    return bool((found - expected).norm() <= within * expected.norm())


def pad_candidate(tokenizer, vocab_size: int) -> str:
    """A token to pad with: the one named pad, else another special token than eos, else eos itself.

    Padding with eos would still be right here, as padding is masked by position everywhere, but a reward model would
    read its score one token early. Ids from `vocab_size` on have no embedding.
    """
    special = [t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special and i < vocab_size]
    named = [token for token in special if "pad" in token.lower()]
    others = [token for token in (tokenizer.unk_token, *special) if token]
    template = str(tokenizer.chat_template)  # a token that starts or ends a turn cannot be padding
    free = (t for t in (*named, *others) if t not in (tokenizer.eos_token, tokenizer.bos_token) and t not in template)
    return next(free, tokenizer.eos_token)
