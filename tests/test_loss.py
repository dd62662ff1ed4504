"""The loss of PT and SFT: PyTorch's numbers and gradients, at the trained tokens alone, without its copies."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

import arguments.loss
from arguments.command_line import Fault
from arguments.loss import SummedCrossEntropy, TokenLoss

IDS = torch.tensor([[5, 6, 7, 8, 9, 2, 1, 1], [10, 11, 12, 13, 14, 15, 16, 2]])
LABELS = torch.tensor([[-100, -100, 7, 8, -100, 2, -100, -100], [-100, 11, -100, 13, 14, 15, 16, 2]])


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


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family, tiny):
    """The output layer sees nine of sixteen places."""
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    trainer, seen = TokenLoss(), []
    trainer.accelerator = SimpleNamespace(num_processes=1, unwrap_model=lambda model: model)
    batch = {"input_ids": IDS, "attention_mask": (IDS != 1).long()}
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[-1].shape))
    loss = trainer.compute_loss(model, batch | {"labels": LABELS.clone()}, num_items_in_batch=9)
    hook.remove()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = model(**batch, labels=LABELS, use_cache=False).loss
    expected.backward()
    assert [shape[:2] for shape in seen] == [(1, 9)]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert found.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)


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

    trainer = TokenLoss()
    trainer.accelerator = SimpleNamespace(num_processes=1, unwrap_model=lambda model: model)
    with pytest.raises(Fault, match="past its output layer"):
        trainer.compute_loss(Bypassing(), {"input_ids": IDS, "labels": LABELS.clone()})
