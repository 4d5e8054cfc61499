"""``LowRankKFAC`` in a loop of accelerate and in the Trainer of transformers, against the plain loop."""

import copy
import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LinearLR

import lrkfac
from tests.peers.batches import BATCHES, SIZE, data, loader_for
from tests.test_optim_loops import LIKELIHOOD, NORM, each_chain, network, optimizer_of

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EPOCHS = 2
STEPS = EPOCHS * BATCHES


@pytest.fixture(autouse=True)
def fresh():
    forget_settings()
    yield
    forget_settings()


def forget_settings():
    """Those that accelerate keeps for a whole process. Imported for these tests alone: it takes seconds."""
    state = pytest.importorskip("accelerate.state", reason="the extra 'peers' is not installed")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.fixture
def trainers():
    pytest.importorskip("transformers", reason="the extra 'peers' is not installed")
    return importlib.import_module("tests.peers.trainers")


def scheduler_of(optimizer, accumulate=1):
    """None for a chain without a rate."""
    return LinearLR(optimizer, 1.0, 0.1, STEPS // accumulate) if "lr" in optimizer.param_groups[0] else None


def plain_loop(net, options, accumulate=1, autocast=False):
    net = copy.deepcopy(net)
    optimizer = optimizer_of(net, options)
    scheduler, losses = scheduler_of(optimizer, accumulate), []
    for i, (inputs, labels) in enumerate(batch for _ in range(EPOCHS) for batch in loader_for(net)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(optimizer.evaluate(inputs, labels).loss)
        if (i + 1) % accumulate == 0:
            clip_grad_norm_(net.parameters(), NORM)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return net.state_dict(), optimizer, losses


def same(net, expected):
    torch.testing.assert_close(net.state_dict(), expected, rtol=0, atol=0)


def prepared(net, options, accumulate=1, precision="no"):
    accelerator = importlib.import_module("accelerate").Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision, step_scheduler_with_optimizer=True
    )
    optimizer = optimizer_of(net, options)
    # On one process the scheduler counts steps of the optimizer.
    parts = accelerator.prepare(net, optimizer, loader_for(net), scheduler_of(optimizer, accumulate))
    return accelerator, *parts


def train(accelerator, net, optimizer, loader, scheduler, epochs=EPOCHS):
    for inputs, labels in (batch for _ in range(epochs) for batch in loader):
        with accelerator.accumulate(net):
            with accelerator.autocast():
                optimizer.optimizer.evaluate(inputs, labels)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), NORM)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@each_chain
def test_a_loop_of_accelerate(options, accumulate):
    net = network()
    expected, optimizer, _ = plain_loop(net, options, accumulate)
    parts = prepared(net, options, accumulate)
    train(*parts)
    same(net, expected)
    assert parts[2].optimizer.steps == optimizer.steps == STEPS // accumulate
    assert parts[2].param_groups[0].get("lr", 0) == optimizer.param_groups[0].get("lr", 0)


def test_mixed_precision_of_accelerate_is_that_of_the_evaluation():
    net, options = network().float(), {"lr": 0.1, "rank": 3}
    expected, full = plain_loop(net, options, autocast=True)[0], plain_loop(net, options)[0]
    train(*prepared(net, options, precision="bf16"))
    same(net, expected)
    assert any(not torch.equal(expected[name], full[name]) for name in full)


@each_chain
def test_a_run_that_goes_on_from_save_state_is_that_which_did_not_stop(options, tmp_path):
    net = network()
    expected, _, _ = plain_loop(net, options)
    parts = prepared(net, options)
    train(*parts, epochs=1)
    parts[0].save_state(tmp_path)
    forget_settings()
    torch.manual_seed(5)
    other = network()
    parts = prepared(other, options)
    parts[0].load_state(tmp_path)
    train(*parts, epochs=1)
    same(other, expected)


def test_backward_of_accelerate_is_told_what_to_do():
    net = network()
    accelerator, net, optimizer, loader, _ = prepared(net, {"lr": 0.1, "rank": 3})
    before = copy.deepcopy(net.state_dict())
    inputs, labels = next(iter(loader))
    accelerator.backward(F.cross_entropy(net(inputs), labels))
    with pytest.raises(TypeError, match=r"got \['0\.weight', .*backward pass; .*call evaluate\(inputs, targets\)"):
        optimizer.step()
    same(net, before)


def examples(dtype):
    return [{"x": x, "labels": label} for x, label in data(dtype)]


def trainer_of(trainers, net, options, path, accumulate=1, kind="KFACTrainer", **arguments):
    settings = trainers.TrainingArguments(
        output_dir=str(path), num_train_epochs=EPOCHS, per_device_train_batch_size=SIZE, max_grad_norm=NORM,
        gradient_accumulation_steps=accumulate, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        train_sampling_strategy="sequential", **arguments,
    )  # fmt: skip
    model, rows = trainers.Classifier(net), examples(net[0].weight.dtype)
    one = {"x": rows[0]["x"][None]}
    optimizer = lrkfac.LowRankKFAC(model, LIKELIHOOD, one, estimator="exact", statistics_every=2, **options)
    pair = (optimizer, scheduler_of(optimizer, accumulate) or of_nothing())
    return getattr(trainers, kind)(model, settings, train_dataset=rows, optimizers=pair)


def of_nothing():
    """The Trainer wants a scheduler, and a chain without a rate has none to turn."""
    return LinearLR(torch.optim.SGD([torch.zeros(1)]), 1.0, 0.1, STEPS)


@pytest.mark.parametrize("accumulate", [1, 2])
@each_chain
def test_a_trainer_that_evaluates(trainers, options, accumulate, tmp_path):
    """Its logs have the mean loss of the micro-batches of each step."""
    net = network()
    expected, optimizer, losses = plain_loop(net, options, accumulate)
    trainer = trainer_of(trainers, net, options, tmp_path, accumulate, save_strategy="no")
    trainer.train()
    same(net, expected)
    assert trainer.optimizer.optimizer.steps == trainer.state.global_step == STEPS // accumulate
    assert trainer.optimizer.param_groups[0].get("lr", 0) == optimizer.param_groups[0].get("lr", 0)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    means = torch.stack(losses).unflatten(0, (-1, accumulate)).mean(1)
    torch.testing.assert_close(torch.tensor(logged), means.float(), rtol=0, atol=1e-4)


def test_the_scheduler_that_a_trainer_makes_sets_the_rate(trainers, tmp_path):
    options = {"lr": 0.1, "rank": 3}
    trainer = trainer_of(trainers, network(), options, tmp_path, save_strategy="no", warmup_steps=4)
    trainer.lr_scheduler = None
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.1 * min(i / 4, (STEPS - i) / (STEPS - 4)) for i in range(STEPS)])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_mixed_precision_of_the_trainer_is_that_of_the_evaluation(trainers, tmp_path):
    net, options = network().float(), {"lr": 0.1, "rank": 3}
    expected, full = plain_loop(net, options, autocast=True)[0], plain_loop(net, options)[0]
    trainer_of(trainers, net, options, tmp_path, bf16=True, save_strategy="no").train()
    same(net, expected)
    assert any(not torch.equal(expected[name], full[name]) for name in full)


@each_chain
def test_a_trainer_that_goes_on_from_a_checkpoint_is_that_which_did_not_stop(trainers, options, tmp_path):
    net = network()
    expected, _, _ = plain_loop(net, options)
    trainer_of(trainers, net, options, tmp_path, save_strategy="steps", save_steps=BATCHES).train()
    same(net, expected)
    torch.manual_seed(5)
    other = network()
    trainer = trainer_of(trainers, other, options, tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{BATCHES}"))
    assert trainer.optimizer.optimizer.steps == STEPS
    same(other, expected)


def test_a_trainer_that_owns_the_loss_is_told_what_to_do(trainers, tmp_path):
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match=r"got \['net\.0\.weight', .*Trainer of transformers within training_step"):
        trainer_of(trainers, net, {"lr": 0.1, "rank": 3}, tmp_path, kind="Trainer", save_strategy="no").train()
    same(net, before)
