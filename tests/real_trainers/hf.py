"""transformers' Trainer for one known step on a CPU."""

import torch
import transformers

RATE = 0.5


def arguments(out, kind=None, **changes):
    values = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return (kind or transformers.TrainingArguments)(**values | changes)


class InOrder(transformers.Trainer):
    """Takes the samples as they come, so that a test knows the batches."""

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)
