"""ResNet-18 for 32 x 32 images, in the code structure of torchvision's."""

from __future__ import annotations

from torch import Tensor, nn

from examples.resnet import Block


class ResNet18(nn.Module):
    """He et al. 2016 (arXiv 1512.03385) with the stem for small images: 3 x 3, no pooling; 11.2 million parameters."""

    def __init__(self, classes: int = 10, widths: tuple[int, ...] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        blocks = []
        for stage, (d_in, d_out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            blocks += [Block(d_in, d_out, 2 if stage else 1), Block(d_out, d_out, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, H, W]``."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
