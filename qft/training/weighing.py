"""The Hugging Face Trainer, made to average over what labels weigh where that is not the same of each."""

from typing import Any

import torch

from qft.memory.fused_loss import WEIGHTS
from qft.training.stopping import StoppingTrainer


class WeighingTrainer(StoppingTrainer):
    """Trainer whose steps are means over the weights of their labels."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The library's number of labels; of weighted ones what they weigh together."""
        if not batch_samples or WEIGHTS not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([batch[WEIGHTS][:, 1:].sum() for batch in batch_samples]).sum().to(device)
        shared = self.args.average_tokens_across_devices and self.args.world_size > 1
        return self.accelerator.gather(total).sum() if shared else total
