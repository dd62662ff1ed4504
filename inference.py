r"""Talk to the model of any stage, answer a file of questions, or compare models on it.

    python inference.py --base_model outputs/rl-merged --interactive
    python inference.py --base_model models/SmolLM2-135M-Instruct --lora_model outputs/sft --data_file questions.txt \
        --predictions_file answers.jsonl
    python inference.py --compare outputs/sft-merged outputs/rl-merged --reward_model outputs/rm-merged \
        --data_file data/prompts/validation --predictions_file compared.jsonl
    python inference.py --compare models/SmolLM2-135M-Instruct outputs/sft-merged outputs/rl-merged --web

Reads   a model (--base_model), with an adapter on it or not (--lora_model); questions: a .txt with one a line, or
        prompts and conversations in any of the forms of data/README.md.
Writes  predictions_file: JSON lines {"Input", "Output", "Model", "With": weights and settings}, and "Messages" where
        there was more than the question, after those of an earlier call; with --compare
        {"Input", "Output": {model: answer}, "Score": {model: reward}}.
        votes_file: with --web, preference pairs for stage 3.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from peft import PeftModel, TaskType
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopPLogitsWarper,
)

from arguments.adapter import with_saved_adapter
from arguments.answers import mean, win_rate
from arguments.atomic import append_lines, hold_file
from arguments.base import adapter_config, adapter_folder, check_base, fingerprint, tokenizer_folder
from arguments.checkpoints import size_and_hash
from arguments.command_line import UserError, expect, given, one_line, parse_arguments, run_stage
from arguments.data import DataArguments
from arguments.encoding import LengthArguments, known_ids
from arguments.model import ModelArguments, check_finite
from arguments.precision import best_precision
from arguments.predictions import already_answered, question_of, refuse_to_replace, replace_lines, writable
from arguments.reward import RewardSourceArguments
from arguments.sampling import InverseTransformSampling, takes_padding, uniforms
from arguments.streamed import adapter_shapes, grown_vocabulary
from arguments.web import serve

with contextlib.suppress(ImportError):  # some Pythons lack it
    import readline  # noqa: F401 - gives input() line editing, of Chinese characters too

ANSWERS = "predictions.jsonl"
# Flags that change the answers of a model: written beside each one
SETTINGS = ("max_source_length", "max_new_tokens", "temperature", "top_p", "with_prompt")
SETTINGS += ("tokenizer_path", "dtype", "load_in_8bit", "load_in_4bit")


@dataclass
class InferenceArguments:
    """The 2023 script's flags, --compare and --web."""

    base_model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model_name_or_path", "--model-name-or-path"],
            "help": "Folder or hub name of the model.",
        },
    )
    lora_model: str | None = field(default=None, metadata={"help": "Adapter to put on it; a merged model needs none."})
    tokenizer_path: str | None = field(default=None, metadata={"help": "If not the adapter's, or the model's, own."})
    interactive: bool = field(default=False, metadata={"help": "Chat; the default without --data_file."})
    data_file: str | None = field(default=None, metadata={"help": "File or folder of questions."})
    predictions_file: str | None = field(
        default=None, metadata={"help": f"Where the answers to the data_file go. Default: {ANSWERS}"}
    )
    with_prompt: bool = field(
        default=True, metadata={"help": "Ask through the chat template; False: continue the bare text."}
    )
    system: str | None = field(default=None, metadata={"help": "System text of a chat, or of questions without one."})
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Models that all answer the data_file, or side by side with --web."}
    )
    web: bool = field(default=False, metadata={"help": "Chat in the browser, on this machine only (needs gradio)."})
    port: int = field(default=7860, metadata={"help": "Port of --web."})
    votes_file: str = field(default="votes.jsonl", metadata={"help": "Where the votes of --web go, as pairs for RM."})
    reward_model: str | None = field(default=None, metadata={"help": "With --compare: it scores each answer."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens kept of a conversation."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the most likely token each time."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    batch_size: int = field(default=8, metadata={"help": "Questions answered at once."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Answer only that many, from the first on."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights. Default, also auto: what suits the hardware.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit weights (needs bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit NF4 weights (needs bitsandbytes)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    force: bool = field(default=False, metadata={"help": "Use an adapter though its base has changed."})
    only_cpu: bool = field(default=False, metadata={"help": "Use no GPU."})
    gpus: str | None = field(default=None, metadata={"help": "Which GPUs, as CUDA_VISIBLE_DEVICES; e.g. 0 or 0,1."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})
    model_type: str | None = field(default=None, metadata={"help": "Accepted from older scripts; the config decides."})
    resize_emb: bool = field(
        default=False, metadata={"help": "Accepted from older scripts; embeddings have the rows that the model holds."}
    )

    def __post_init__(self):
        if not (self.base_model or self.compare):
            raise UserError("--base_model is missing: name the model to talk to, or several with --compare")
        if self.compare and not (self.data_file or self.web):
            raise UserError("--compare needs --data_file, the questions that all models answer, or --web")
        if self.compare and self.lora_model:
            raise UserError(
                "--lora_model goes with --base_model, and --compare takes whole models: merge the adapter "
                "(merge_peft_adapter.py) and name the merged model in --compare"
            )
        if self.compare and self.base_model:
            raise UserError("--compare and --base_model: name all models in --compare")
        if len({Path(name).resolve() for name in self.compare}) < len(self.compare):
            raise UserError(f"--compare {' '.join(self.compare)} names a model twice: name each once")
        if self.data_file and (self.interactive or self.web):
            flag = "--interactive" if self.interactive else "--web"
            raise UserError(f"{flag} is a chat, and --data_file a file to answer: give one of them")
        if self.predictions_file and not self.data_file:
            raise UserError("--predictions_file is for the answers to a --data_file: add that, or leave it out")
        if self.system and not self.with_prompt:
            raise UserError("--system is told by the chat template, which --with_prompt False leaves out: give one")
        self.predictions_file = self.predictions_file or ANSWERS
        if self.reward_model and not (self.compare and self.data_file):
            raise UserError(
                "--reward_model scores the answers of --compare with --data_file: add these, or leave it out"
            )
        self.dtype = None if self.dtype == "auto" else self.dtype
        counts = "max_new_tokens", "batch_size", "max_source_length", "max_eval_samples"
        expect(self, "at least 1", lambda x: x >= 1, *counts)
        expect(self, f"0 to {2**32 - 1}", lambda x: 0 <= x < 2**32, "seed")
        expect(self, f"1 to {2**16 - 1}", lambda x: 0 < x < 2**16, "port")
        expect(self, "0 or more", lambda x: 0 <= x < math.inf, "temperature")
        expect(self, "a share above 0, up to 1", lambda x: 0 < x <= 1, "top_p")
        if self.only_cpu or self.gpus is not None:  # before CUDA is initialised
            os.environ["CUDA_VISIBLE_DEVICES"] = "" if self.only_cpu else self.gpus

    def model_args(self, name: str, adapter: Path | None = None) -> ModelArguments:
        own = tokenizer_folder(adapter) if adapter else None  # the adapter was trained on its tokens and template
        args = ModelArguments(
            model_name_or_path=name,
            tokenizer_name_or_path=self.tokenizer_path or (str(own) if own else None),
            dtype=self.dtype,
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            trust_remote_code=self.trust_remote_code,
        )
        args.resolve_dtype(best_precision(sampling=True), trains_all=False)
        return args

    def placed(self, model: torch.nn.Module) -> torch.nn.Module:
        """On the GPU where there is one; bitsandbytes has loaded its models there."""
        on_cpu = next(model.parameters()).device.type == "cpu"
        return model.to("cuda") if torch.cuda.is_available() and on_cpu else model


def find_adapter(adapter: str, base: str, args: InferenceArguments) -> Path:
    """The folder of the adapter that --lora_model names, looked at before its base is loaded.

    Raises:
        UserError: when there is none, or one that gives no answers on this base.
    """
    if (folder := adapter_folder(adapter)) is None:
        raise UserError(f"--lora_model {adapter} holds no adapter_config.json: name the output folder of a stage")
    task = adapter_config(folder).task_type
    if task not in (None, TaskType.CAUSAL_LM):
        raise UserError(f"--lora_model {adapter} is a {task} adapter: it scores answers, it gives none")
    if not adapter_shapes(folder):
        raise UserError(f"--lora_model {adapter}: its file of weights is empty: copy or train it again")
    args.model_args(base).load_config()  # says that there is no base, which its files could not
    check_base(folder, base, args.force)
    return folder


def with_adapter(model: torch.nn.Module, adapter: Path, base: str) -> PeftModel:
    """The model with the adapter on it.

    Raises:
        UserError: when it does not fit.
    """
    if grown_vocabulary(model, adapter):
        raise UserError(
            f"{adapter} was trained with another number of token ids than {base} has: merge it "
            "(merge_peft_adapter.py) and name the merged model as --base_model"
        )
    try:
        return with_saved_adapter(model, adapter, "default", trainable=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--lora_model {adapter} is not an adapter for {base}: {one_line(error)}") from error


class Answerer:
    """A model that answers conversations: batched or streamed."""

    def __init__(self, name: str, args: InferenceArguments, adapter: str | None = None):
        folder = find_adapter(adapter, name, args) if adapter else None
        model_args = args.model_args(name, folder)
        self.args, self.tokenizer = args, model_args.load_tokenizer()
        longest = model_args.longest_question(args.max_source_length, args.max_new_tokens)
        self.lengths = LengthArguments(max_source_length=longest)
        model = model_args.load_model(AutoModelForCausalLM)
        if folder:
            model = with_adapter(model, folder, name)
        self.model = args.placed(model).eval()
        check_finite(self.model, self.tokenizer, "take --dtype float32")
        self.asked = 0  # how many answers it gave: each is drawn by random numbers of its own
        self.settings = GenerationConfig(
            max_new_tokens=args.max_new_tokens,
            do_sample=False,  # drawn() leaves one token to take
            eos_token_id=self.lengths.eos_ids(self.model, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.model.generation_config = self.settings  # the model's own may ask for penalties, min_p and the like

    def ids(self, messages: list[dict]) -> list[int]:
        if self.args.with_prompt:
            ids = self.lengths.encode_prompt(self.tokenizer, messages)["input_ids"]
        else:
            ids = self.tokenizer(messages[-1]["content"])["input_ids"][-self.lengths.max_source_length :]
        return known_ids(self.tokenizer, ids)

    def drawn(self, numbers: Iterable[int], width: int) -> LogitsProcessorList:
        """Sampling of the answers with these numbers, each a function of --seed and its own number alone, behind
        prompts of `width` tokens."""
        args = self.args
        if not args.temperature:
            return LogitsProcessorList()
        draws = uniforms([f"{args.seed} answer {number}" for number in numbers], args.max_new_tokens)
        likely = [TopPLogitsWarper(args.top_p)] if args.top_p < 1 else []
        choice = InverseTransformSampling(draws.to(self.model.device), width, temperature=1.0)
        return LogitsProcessorList([TemperatureLogitsWarper(args.temperature), *likely, choice])

    def answer(
        self,
        conversations: list[list[dict]],
        numbers: Sequence[int] | None = None,
        streamer: TextStreamer | None = None,
    ) -> list[tuple[str, bool]]:
        """Of each conversation the answer, and whether it ended before --max_new_tokens.

        `numbers` are those of the answers, by default counted on.
        """
        rows = {"input_ids": [self.ids(messages) for messages in conversations]}
        batch = self.tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(self.model.device)
        width = batch["input_ids"].shape[1]
        numbers = numbers or range(self.asked, self.asked + len(conversations))
        self.asked += len(conversations)
        found = self.model.generate(**batch, streamer=streamer, logits_processor=self.drawn(numbers, width))[:, width:]
        ends = torch.isin(found, torch.tensor(self.settings.eos_token_id, device=found.device)).any(1).tolist()
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        whole = (text.rstrip("\ufffd").strip() for text in texts)  # the limit may cut the bytes of a character
        return list(zip(whole, ends, strict=True))

    def stream(self, messages: list[dict]) -> Iterator[str]:
        """The answer as far as it has come, longer each time."""
        streamer, text = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True), ""

        def answer():
            try:
                return self.answer([messages], streamer=streamer)
            finally:
                streamer.end()  # even if generating failed, or the loop below would wait forever

        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(answer)
            for piece in streamer:
                text += piece
                yield text
            yield found.result()[0][0]

    def answer_all(self, conversations: list[list[dict]], first: int = 0) -> Iterator[tuple[str, bool]]:
        """`answer` of all in order, counted from `first`; of 4 batches at a time, those of similar length together."""
        size = min(self.args.batch_size, len(conversations) or 1)
        if size > 1 and not takes_padding(self.model, self.tokenizer, [self.ids(m) for m in conversations[:64]]):
            size = 1
        with tqdm(total=len(conversations), desc="Answering") as bar:
            for start in range(0, len(conversations), 4 * size):
                group, answers = conversations[start : start + 4 * size], {}
                by_length = sorted(range(len(group)), key=lambda i: len(self.ids(group[i])))
                for batch in (by_length[i : i + size] for i in range(0, len(group), size)):
                    numbers = [first + start + i for i in batch]
                    answers |= zip(batch, self.answer([group[i] for i in batch], numbers), strict=True)
                    bar.update(len(batch))
                yield from (answers[i] for i in range(len(group)))


def chat(answerer: Answerer, system: str | None) -> None:
    """Ask and answer on the terminal, with history, until the input ends."""
    print("Ask away. /clear forgets what was said, /exit (or Ctrl-D) ends.")
    if isinstance(sys.stdin, io.TextIOWrapper):  # else other encodings would end the chat in a traceback
        sys.stdin.reconfigure(errors="surrogateescape")
    before = [{"role": "system", "content": system}] if system else []
    messages = list(before)
    streamer = TextStreamer(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            question = input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question == "/exit":
            return
        if any("\ud800" <= letter <= "\udfff" for letter in question):
            print("That was not UTF-8 text, and the model has not seen it: set the terminal to UTF-8, and ask again.")
            continue
        if question == "/clear":
            messages = list(before)
        elif question.startswith("/") and " " not in question:
            print(f"{question} is not a command: there are /clear and /exit.")
        elif question:
            print("Model: ", end="", flush=True)
            messages.append({"role": "user", "content": question})
            ((text, _),) = answerer.answer([messages], streamer=streamer)
            messages.append({"role": "assistant", "content": text})


def load_questions(args: InferenceArguments) -> list[list[dict]]:
    """The conversations of the data file, in order, with --system where they have no such text.

    A line of a .txt is a question.
    """
    questions = DataArguments(args.data_file).load_questions()
    if not args.system:
        return questions
    system = {"role": "system", "content": args.system}
    return [asked if asked[0]["role"] == "system" else [system, *asked] for asked in questions]


def answered_with(args: InferenceArguments) -> dict:
    """What a line of answers says of the weights and the flags behind it: those flags that are not as by default."""
    settings = (*SETTINGS, "seed") if args.temperature else SETTINGS
    found = {name: getattr(args, name) for name in given(args, settings)}
    args.model_args(args.base_model).load_config()  # says that there is no model, which its files could not
    adapter = adapter_folder(args.lora_model) if args.lora_model else None
    own = [size_and_hash(path) for path in sorted(adapter.glob("adapter_model.*"))] if adapter else []
    if known := fingerprint(args.base_model):  # a model of the hub has none until it is here
        weights = json.dumps([known["shapes"], known["weights"], own])
        found["weights"] = hashlib.sha256(weights.encode()).hexdigest()[:16]
    return found


def answer_file(args: InferenceArguments) -> None:
    path, asked = writable("predictions_file", args.predictions_file), load_questions(args)
    name = args.lora_model or args.base_model
    settings = answered_with(args)
    done = already_answered(path, asked, name, settings)
    questions = asked[: args.max_eval_samples]
    if done:
        logger.info(f"{min(done, len(questions))} of {len(questions)} answers are in {path}: going on behind them")
    if done >= len(questions):
        return  # no model is loaded for nothing
    answerer = Answerer(args.base_model, args, args.lora_model)
    if not hold_file(path) or already_answered(path, asked, name, settings) > done:
        raise UserError(f"--predictions_file {path}: another call is writing there. Wait for its end, or name another")
    for messages, (text, _) in zip(questions[done:], answerer.answer_all(questions[done:], done), strict=True):
        append_lines(path, [question_of(messages) | {"Output": text, "Model": name, "With": settings}])
    logger.info(f"{len(questions)} answers in {path}")


def compare(args: InferenceArguments) -> None:
    """Let each model answer all questions; print mean reward, length and wins against the first model."""
    path = writable("predictions_file", args.predictions_file)
    questions = load_questions(args)[: args.max_eval_samples]
    refuse_to_replace(path)
    for name in args.compare:  # a wrong name fails before the first model has answered
        args.model_args(name).load_config()
    if args.reward_model:
        load_scorer(args)  # and lets go of it: a wrong one is said now, without its memory being held meanwhile
    answers = {name: list(Answerer(name, args).answer_all(questions)) for name in args.compare}
    rows = [
        {"Input": messages[-1]["content"], "Output": {name: found[i][0] for name, found in answers.items()}}
        for i, messages in enumerate(questions)
    ]
    replace_lines(path, rows)  # before they are scored: if that fails, the answers are there
    scores = score(args, questions, answers) if args.reward_model else {}
    if scores:
        scored = [{"Score": {name: values[i] for name, values in scores.items()}} for i in range(len(rows))]
        replace_lines(path, [row | score for row, score in zip(rows, scored, strict=True)])
    first = args.compare[0]
    for name, found in answers.items():
        line = f"{name}: {sum(len(text) for text, _ in found) / len(found):.0f} characters an answer"
        if scores:
            wins = win_rate(scores[name], scores[first])
            line += f", mean reward {mean(scores[name]):.3f}, wins against {first}: {wins:.2f}"
        print(line)
    print(f"{len(questions)} questions, answers in {args.predictions_file}")


def load_scorer(args: InferenceArguments) -> torch.nn.Module:
    """The reward model, as RL would load it.

    Raises:
        UserError: when it is none, or its files are damaged.
    """
    lengths = LengthArguments(max_source_length=args.max_source_length, max_target_length=args.max_new_tokens)
    source = RewardSourceArguments(reward_model_name_or_path=args.reward_model)
    model_args = args.model_args(args.compare[0])
    if not (args.dtype or torch.cuda.is_available()):  # as RL scores on a CPU, even where answers take bfloat16
        model_args.dtype = "float32"
    try:
        return source.load_model(lengths, model_args)
    except UserError as error:
        raise UserError(str(error).replace("--reward_model_name_or_path", "--reward_model")) from error
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(f"--reward_model {args.reward_model} cannot be loaded: {one_line(error)}") from error


def score(args: InferenceArguments, questions: list, answers: dict[str, list]) -> dict[str, list[float]]:
    """What the reward model says of each answer (text, whether it ended), as RL would score it."""
    model, found = args.placed(load_scorer(args)), {}
    for name, told in answers.items():
        found[name] = []
        for start in tqdm(range(0, len(told), args.batch_size), desc="Scoring"):
            texts, ended = zip(*told[start : start + args.batch_size], strict=True)
            turns = [[{"role": "assistant", "content": text}] for text in texts]
            rows = [question + turn for question, turn in zip(questions[start:], turns, strict=False)]
            found[name] += model(rows, ended).tolist()
    return found


def main():
    (args,) = parse_arguments(InferenceArguments)
    if args.web:
        serve(args, args.compare or [args.base_model], lambda name: Answerer(name, args, args.lora_model))
    elif args.compare:
        compare(args)
    elif args.data_file:
        answer_file(args)
    else:
        chat(Answerer(args.base_model, args, args.lora_model), args.system)


if __name__ == "__main__":
    run_stage(main)
