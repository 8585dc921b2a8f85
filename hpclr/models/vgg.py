"""VGG-16 in its CIFAR form: batch norm, and one linear layer behind the convolutions.

The convolutions are configuration D of Simonyan and Zisserman, arXiv 1409.1556.
"""

from torch import Tensor, nn

from hpclr.models.common import check_dropout, check_positive, check_whole, image_shape, init_conv_net

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the 13 convolutions; a 2x2 max-pooling ends each stage."""


class VGG16(nn.Module):
    """13 convolutions 3x3 in five stages, global average pooling, and the head.

    Poolings round sizes up, so that images of any size pass: 32x32 ends at 1x1, 28x28 as well.

    Args:
        sample_shape: (channels, height, width).
        classes: number of logits.
        width: factor on the channels of every convolution.
        dropout: probability before the head.

    Raises:
        ValueError: an option is out of its range, or the samples are no images.
    """

    def __init__(
        self, sample_shape: tuple[int, ...], classes: int, *, width: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        channels, _, _ = image_shape("vgg16", sample_shape)
        check_whole("vgg16", classes=classes)
        check_positive("vgg16", width=width)
        check_dropout("vgg16", dropout)
        layers: list[nn.Module] = []
        for stage in STAGES:
            for base in stage:
                out = max(1, round(base * width))
                layers += _conv(channels, out)
                channels = out
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, classes)
        init_conv_net(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, channels, height, width)."""
        logits: Tensor = self.head(self.dropout(self.pool(self.features(x)).flatten(1)))
        return logits


def _conv(fan_in: int, fan_out: int) -> list[nn.Module]:
    """Return convolution, batch norm (which makes a bias pointless) and ReLU."""
    conv = nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(fan_out), nn.ReLU()]
