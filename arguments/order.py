"""The order of training rows: a function of seed and epoch, and of nothing else."""

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

# of transformers' field: a stage that overrides it would lose them
STRATEGIES = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["choices"]


class EpochSampler(Sampler):
    """Indices of all rows, reshuffled in each epoch of `trainer`; given `lengths`, similar ones are put together.

    transformers' sampler by length draws from the global generator: a run resumed after its first epoch saw some rows
    twice and others never. Its random one learns the epoch from accelerate, which with several processes does not
    reach it in the epoch in which a run resumes.
    """

    def __init__(self, trainer, rows: int, lengths: list[int] | None):
        self.trainer, self.rows, self.lengths = trainer, rows, lengths

    def __len__(self):
        return self.rows

    def __iter__(self):
        args = self.trainer.args
        generator = torch.Generator().manual_seed(args.order_seed + int(self.trainer.state.epoch or 0))
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return iter(get_length_grouped_indices(self.lengths, batch, generator=generator))


class SeededOrder:
    """Mixed into a Trainer: rows come in the order of EpochSampler, grouped by their column "length" if asked for."""

    def _get_train_sampler(self, train_dataset=None):
        # not the argument, of which transformers has removed "length" as a column that no model reads
        strategy, dataset = self.args.train_sampling_strategy, self.train_dataset
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        grouped = strategy == "group_by_length" and "length" in dataset.column_names  # blocks of PT are all alike
        return EpochSampler(self, len(dataset), dataset["length"][:] if grouped else None)
