"""A Trainer of transformers that trains by ``LowRankKFAC``, and a model for it."""

from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

__all__ = ["Classifier", "KFACTrainer", "Trainer", "TrainingArguments"]


class Classifier(nn.Module):
    """A model as those of transformers are: it returns its loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class KFACTrainer(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with self.accelerator.autocast():
            loss = self.optimizer.optimizer.evaluate(inputs, labels).loss
        return loss / self.current_gradient_accumulation_steps
