"""Modules of Lightning that train by ``LowRankKFAC``, and some that do it wrongly."""

from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR

from tests.test_optim_loops import NORM, optimizer_of


class Module(LightningModule):
    """Validates, too: the module changes its mode and comes back."""

    def __init__(self, net, options, rate=None):
        super().__init__()
        self.net, self.options, self.rate = net, options, rate

    def configure_optimizers(self):
        optimizer = optimizer_of(self.net, self.options)
        if self.rate is None:
            return optimizer
        scheduler = ExponentialLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def validation_step(self, batch, i):
        inputs, labels = batch
        self.log("validation_loss", F.cross_entropy(self.net(inputs), labels))


class Automatic(Module):
    def training_step(self, batch, i):
        loss = self.optimizers().evaluate(*batch).loss
        self.log("loss", loss)
        return loss

    def backward(self, loss):
        """`evaluate` has set `.grad` already."""

    def optimizer_zero_grad(self, *_):
        """Lightning would call it after `training_step`, and drop what `evaluate` has set."""


class Clipping(Automatic):
    """Lightning's own clipping refuses optimizers that know what a ``GradScaler`` is, if the precision is mixed."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_grad_norm_(self.parameters(), gradient_clip_val)


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch, i):
        optimizer = self.optimizers()
        self.log("loss", optimizer.evaluate(*batch).loss)
        clip_grad_norm_(self.parameters(), NORM)
        optimizer.step()
        if self.rate is not None:
            self.lr_schedulers().step()


class OwnsTheLoss(Module):
    def training_step(self, batch, i):
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)


class OwnsTheLossByHand(OwnsTheLoss):
    automatic_optimization = False

    def training_step(self, batch, i):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, i))
        optimizer.step()


class ClearsGradients(Automatic):
    optimizer_zero_grad = LightningModule.optimizer_zero_grad
