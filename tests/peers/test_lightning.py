"""``LowRankKFAC`` in a ``LightningModule``, by automatic and by manual optimisation, against the plain loop."""

import copy
import importlib

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR

from tests.peers.batches import BATCHES, loader_for
from tests.test_optim_loops import NORM, each_chain, network, optimizer_of

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


EPOCHS = 3


@pytest.fixture
def modules():
    """Imported for these tests alone: it takes seconds."""
    pytest.importorskip("lightning", reason="the extra 'peers' is not installed")
    return importlib.import_module("tests.peers.lightning_modules")


def fit(module, path, epochs=EPOCHS, checkpoint=None, **options):
    lightning = importlib.import_module("lightning.pytorch")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=path, enable_checkpointing=False, **quiet, **options
    )
    loader = loader_for(module.net)
    trainer.fit(module, loader, loader, ckpt_path=checkpoint)
    return trainer


def plain_loop(net, options, accumulate=1, rate=None, autocast=False, epochs=EPOCHS):
    net = copy.deepcopy(net)
    optimizer = optimizer_of(net, options)
    scheduler = None if rate is None else ExponentialLR(optimizer, rate)
    for _ in range(epochs):
        for i, (inputs, labels) in enumerate(loader_for(net)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.evaluate(inputs, labels)
            if (i + 1) % accumulate == 0:
                clip_grad_norm_(net.parameters(), NORM)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
    return net.state_dict(), optimizer


def same(module, expected):
    torch.testing.assert_close(module.net.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
@each_chain
def test_automatic_optimisation(modules, options, accumulate, tmp_path):
    rate = 0.9 if "lr" in options else None
    module = modules.Automatic(network(), options, rate)
    expected, optimizer = plain_loop(module.net, options, accumulate, rate)
    trainer = fit(module, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=NORM)
    same(module, expected)
    assert trainer.optimizers[0].steps == trainer.global_step == optimizer.steps == EPOCHS * BATCHES // accumulate
    assert trainer.optimizers[0].param_groups[0].get("lr", 0) == optimizer.param_groups[0].get("lr", 0)
    assert {"loss", "validation_loss"} <= set(trainer.callback_metrics)


@each_chain
def test_manual_optimisation(modules, options, tmp_path):
    rate = 0.9 if "lr" in options else None
    module = modules.Manual(network(), options, rate)
    expected, optimizer = plain_loop(module.net, options, rate=rate)
    trainer = fit(module, tmp_path)
    same(module, expected)
    assert trainer.optimizers[0].steps == trainer.global_step == optimizer.steps


def test_mixed_precision_of_the_trainer_is_that_of_the_evaluation(modules, tmp_path):
    options = {"lr": 0.1, "rank": 3}
    module = modules.Clipping(network().float(), options)
    expected, _ = plain_loop(module.net, options, autocast=True)
    full, _ = plain_loop(module.net, options)
    fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=NORM)
    same(module, expected)
    assert any(not torch.equal(expected[name], full[name]) for name in full)


@pytest.mark.parametrize("kind", ["Automatic", "Manual"])
@each_chain
def test_a_run_that_goes_on_from_a_checkpoint_is_that_which_did_not_stop(modules, options, kind, tmp_path):
    rate = 0.9 if "lr" in options else None
    module = getattr(modules, kind)(network(), options, rate)
    expected, _ = plain_loop(module.net, options, rate=rate)
    clip = {"gradient_clip_val": NORM} if kind == "Automatic" else {}
    fit(module, tmp_path, epochs=1, **clip).save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(5)
    other = getattr(modules, kind)(network(), options, rate)
    fit(other, tmp_path, checkpoint=tmp_path / "run.ckpt", **clip)
    same(other, expected)


CALL = r"call evaluate\(inputs, targets\)"
REFUSED = {
    "OwnsTheLoss": (TypeError, f"got Tensor; .*Lightning, {CALL} in its training_step"),
    "OwnsTheLossByHand": (TypeError, rf"got \['0\.weight', .*{CALL}, in Lightning"),
    "ClearsGradients": (ValueError, r"have no \.grad any more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_module_that_owns_the_loss_is_told_what_to_do(modules, kind, tmp_path):
    module = getattr(modules, kind)(network(), {"lr": 0.1, "rank": 3})
    before = copy.deepcopy(module.net.state_dict())
    error, match = REFUSED[kind]
    with pytest.raises(error, match=match):
        fit(module, tmp_path)
    same(module, before)
