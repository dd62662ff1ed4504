"""The loss of PT and SFT: PyTorch's numbers and gradients, at the trained tokens alone, without its copies."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import alone, in_process, stage
from tiny_models import FAMILIES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import arguments.loss
from arguments.command_line import Fault
from arguments.loss import SummedCrossEntropy, TokenLoss, own_rows

IDS = torch.tensor([[5, 6, 7, 8, 9, 2, 1, 1], [10, 11, 12, 13, 14, 15, 16, 2]])
LABELS = torch.tensor([[-100, -100, 7, 8, -100, 2, -100, -100], [-100, 11, -100, 13, 14, 15, 16, 2]])


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 60, 2**24])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)]
)
def test_sum_and_gradient_are_those_of_pytorch(dtype, tolerance, chunk, monkeypatch):
    monkeypatch.setattr(arguments.loss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 30, generator=generator)).to(dtype)
    targets = torch.tensor([0, 29, 3, 3, 7, 11, 2])
    own, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = SummedCrossEntropy.apply(own, targets)
    expected = torch.nn.functional.cross_entropy(plain.float(), targets, reduction="sum")
    (0.5 * found).backward()
    (0.5 * expected).backward()
    assert found.dtype == torch.float32 and own.grad.dtype == dtype
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(own.grad, plain.grad, atol=tolerance, rtol=0)


def test_logits_far_out_and_no_target_at_all():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = SummedCrossEntropy.apply(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and logits.grad.tolist() == [[1.0, -1.0, 0.0]]
    assert SummedCrossEntropy.apply(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).item() == 0.0


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family, head, tiny, monkeypatch):
    """Logits are of nine of sixteen places: of all at once, or, where the output layer is frozen, of four at most."""
    monkeypatch.setattr(arguments.loss, "ROWS", 4)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).train()
    model.get_output_embeddings().requires_grad_(head == "trained")
    trainer, seen, summed = alone(TokenLoss()), [], arguments.loss.cross_entropy_
    see = lambda logits, *more: seen.append(len(logits)) or summed(logits, *more)  # noqa: E731
    monkeypatch.setattr(arguments.loss, "cross_entropy_", see)
    batch = {"input_ids": IDS, "attention_mask": (IDS != 1).long()}
    torch.manual_seed(0)  # of what drops with a function
    loss = trainer.compute_loss(model, batch | {"labels": LABELS.clone()}, num_items_in_batch=9)
    (2 * loss).backward()
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(0)
    expected = model(**batch, labels=LABELS, use_cache=False).loss
    (2 * expected).backward()
    assert seen == ([9] if head == "trained" else [4, 4, 1]) and model.training
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, gradients(model), atol=1e-6, rtol=1e-5)


def test_logits_that_a_model_caps_are_capped():
    """Behind its output layer, so it is left to make them of all places."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=30, head_dim=8, num_key_value_heads=4, final_logit_softcapping=0.1, **size)
    model = Gemma2ForCausalLM(config).train()
    model.get_output_embeddings().requires_grad_(False)
    loss = alone(TokenLoss()).compute_loss(model, {"input_ids": IDS, "labels": LABELS.clone()}, num_items_in_batch=9)
    torch.testing.assert_close(loss, model(IDS, labels=LABELS, use_cache=False).loss, atol=1e-6, rtol=1e-6)


class ScaledInPlace(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits.mul_(0.1)
        return outputs


def test_logits_that_a_model_writes_over_are_its_logits(tiny):
    """The tensor is the output layer's, the numbers are not."""
    model = ScaledInPlace.from_pretrained(tiny("llama"), dtype=torch.float32)
    model.get_output_embeddings().requires_grad_(False)
    loss = alone(TokenLoss()).compute_loss(model, {"input_ids": IDS, "labels": LABELS.clone()}, num_items_in_batch=9)
    logits = model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, LABELS[:, 1:].flatten(), reduction="sum") / 9
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def test_a_batch_without_a_trained_token(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    model.get_output_embeddings().requires_grad_(False)
    loss = alone(TokenLoss()).compute_loss(model, {"input_ids": IDS, "labels": LABELS.clone().fill_(-100)}, False, 9)
    loss.backward()
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients(model).values())


class TokenTrainer(TokenLoss, Trainer):
    pass


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_held_out_loss_is_the_mean_over_all_tokens(family, accepts, tiny, tmp_path):
    """Of rows of unequal length, whatever loss the model has of its own, and arguments for it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' runs
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    model.accepts_loss_kwargs = accepts
    settings = {"per_device_eval_batch_size": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]
    rows.append({"input_ids": IDS[1], "labels": IDS[1]})
    trainer = TokenTrainer(model, TrainingArguments(str(tmp_path), **settings), eval_dataset=rows)
    found = trainer.evaluate()
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5) and found["eval_tokens"] == 16
    again = trainer.evaluate()
    assert (again["eval_loss"], again["eval_tokens"]) == (found["eval_loss"], 16), "what an earlier one summed counts"


def test_autocasts_logits_are_not_copied(tiny, monkeypatch):
    """As a Trainer prepares a model; the second call finds it without accelerate's wrapper."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' runs
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare_model(AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32))
    assert model(IDS).logits.dtype == torch.float32
    trainer, dtypes = TokenLoss(), []
    trainer.accelerator = accelerator
    summed = SummedCrossEntropy.apply
    monkeypatch.setattr(
        SummedCrossEntropy, "apply", lambda logits, *more: dtypes.append(logits.dtype) or summed(logits, *more)
    )
    for _ in range(2):
        loss, outputs = trainer.compute_loss(model, {"input_ids": IDS, "labels": LABELS.clone()}, True, 9)
        loss.backward()
    assert dtypes == [torch.bfloat16] * 2 and loss.dtype == torch.float32
    assert model(IDS).logits.dtype == torch.bfloat16, "autocast still comes with the model"


def test_logits_that_became_a_gradient_are_not_used_again():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = SummedCrossEntropy.apply(logits * 1, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_that_passes_its_output_layer_by_is_refused():
    class Bypassing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 30)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, use_cache):
            states = torch.zeros(*input_ids.shape, 4)
            return SimpleNamespace(logits=torch.nn.functional.linear(states, self.head.weight))

    with pytest.raises(Fault, match="past its output layer"):
        alone(TokenLoss()).compute_loss(Bypassing(), {"input_ids": IDS, "labels": LABELS.clone()})


@pytest.mark.parametrize("name", ["pt", "sft"])
def test_what_layers_get_and_give_can_be_watched(name, tiny, records, tmp_path):
    """The detector looks for the largest number of each, and fails where there is none."""
    in_process(*stage(name, tiny("llama"), records, tmp_path / "out", "--debug", "underflow_overflow")).ok()


def test_a_sampler_that_fills_up_its_own_batches_is_trained_whole():
    """Of 13 rows in batches of 4 on two ranks the last one has 4 and 1 of its own, of 16 all; those of batch_rebalance
    too."""

    def own(strategy, rank, ranks=2, count=13):
        args = SimpleNamespace(
            world_size=ranks, process_index=rank, train_batch_size=4, train_sampling_strategy=strategy
        )
        state = SimpleNamespace(end_of_dataloader=True)
        accelerator = SimpleNamespace(gradient_state=state)
        return own_rows(SimpleNamespace(args=args, accelerator=accelerator, train_dataset=range(count)), 4)

    assert [own("random", rank) for rank in (0, 1)] == [4, 1]
    assert [own("random", rank, count=16) for rank in (0, 1)] == [4, 4]
    assert [own("random", rank, count=10) for rank in (0, 1)] == [2, 0]
    assert [own("batch_rebalance", rank) for rank in (0, 1)] == [4, 4] and own("random", 0, ranks=1) == 4
