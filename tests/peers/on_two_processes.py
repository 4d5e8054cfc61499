"""Started by torchrun in two processes: a framework trains with halves of the batches that one process would have.

Each process prints how far its parameters are from those of one process alone, and how far these have moved.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lrkfac
from tests.test_optim_loops import LIKELIHOOD, NORM, network, optimizer_of

SIZE, STEPS = 4, 6
OPTIONS = {"lr": 0.1, "rank": 3}


def data():
    torch.manual_seed(1)
    labels = torch.randint(3, (2 * SIZE * STEPS,))
    labels[::5] = -100
    return torch.randn(len(labels), 6).double(), labels


def alone():
    net = network()
    optimizer = optimizer_of(net, OPTIONS)
    for inputs, labels in DataLoader(TensorDataset(*data()), 2 * SIZE):
        optimizer.evaluate(inputs, labels)
        clip_grad_norm_(net.parameters(), NORM)
        optimizer.step()
    return net


def accelerate():
    from accelerate import Accelerator

    accelerator, net = Accelerator(cpu=True), network()
    optimizer = optimizer_of(net, {**OPTIONS, "group": dist.group.WORLD})
    loader = DataLoader(TensorDataset(*data()), SIZE)
    wrapped, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    for inputs, labels in loader:
        optimizer.optimizer.evaluate(inputs, labels)
        accelerator.clip_grad_norm_(wrapped.parameters(), NORM)
        optimizer.step()
    return net


def lightning():
    from lightning.pytorch import Trainer

    from tests.peers.lightning_modules import Automatic

    class Module(Automatic):
        def configure_optimizers(self):
            self.options = {**OPTIONS, "group": dist.group.WORLD}
            return super().configure_optimizers()

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "gradient_clip_val": NORM, "max_epochs": 1}
    module = Module(network(), OPTIONS)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet, **options)
    whole = TensorDataset(*data())
    # Lightning's own sampler shuffles.
    sampler = DistributedSampler(whole, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(whole, SIZE, sampler=sampler))
    return module.net


def transformers():
    from tests.peers.trainers import Classifier, KFACTrainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=SIZE, max_grad_norm=NORM, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
        )  # fmt: skip
        assert settings.world_size == 2  # and the group is there
        model, (inputs, labels) = Classifier(network()), data()
        options = {**OPTIONS, "estimator": "exact", "statistics_every": 2, "group": dist.group.WORLD}
        optimizer = lrkfac.LowRankKFAC(model, LIKELIHOOD, {"x": inputs[:1]}, **options)
        rows = [{"x": x, "labels": label} for x, label in zip(inputs, labels, strict=True)]
        KFACTrainer(model, settings, train_dataset=rows, optimizers=(optimizer, None)).train()
    return model.net


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


if __name__ == "__main__":
    trained = {"accelerate": accelerate, "lightning": lightning, "transformers": transformers}[sys.argv[1]]()
    expected = alone()
    # In one call, so that lines of two processes do not mix.
    print(
        f"distance {distance(trained, expected):.1e}, moved {distance(expected, network()):.1e}\n", end="", flush=True
    )
    dist.destroy_process_group()
