"""The CIFAR ResNets of He et al., arXiv 1512.03385, section 4.2: 6n + 2 layers of basic blocks."""

from torch import Tensor, nn
from torch.nn import functional as F

from hpclr.models.common import check_whole, image_shape, init_conv_net

DEPTHS = (20, 32, 44, 56, 110)


class ResNet(nn.Module):
    """A 3x3 stem and three stages of basic blocks of widths w, 2w, 4w; (depth - 2)/6 blocks a stage.

    Args:
        depth: layers with weights, 6n + 2.
        sample_shape: (channels, height, width).
        classes: number of logits.
        width: channels of the first stage; 16 in the paper.

    Raises:
        ValueError: depth is not 6n + 2, an option is out of its range, or the samples are no images.
    """

    def __init__(self, depth: int, sample_shape: tuple[int, ...], classes: int, *, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"resnet: depth must be 6n + 2, such as {DEPTHS}, found {depth!r}.")
        channels, _, _ = image_shape(f"resnet{depth}", sample_shape)
        check_whole(f"resnet{depth}", classes=classes, width=width)
        blocks = (depth - 2) // 6
        self.stem = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            _stage(width, width, blocks, stride=1),
            _stage(width, 2 * width, blocks, stride=2),
            _stage(2 * width, 4 * width, blocks, stride=2),
        )
        self.head = nn.Linear(4 * width, classes)
        init_conv_net(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, channels, height, width)."""
        features = self.stages(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut without parameters (the paper's option A)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.stride = stride
        self.new_channels = fan_out - fan_in

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, fan_in, h, w) to (batch, fan_out, ⌈h/stride⌉, ⌈w/stride⌉)."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Take every stride-th pixel, and zeros for the channels that are new."""
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


def _stage(fan_in: int, fan_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Return `blocks` basic blocks, of which the first changes resolution and width."""
    first = BasicBlock(fan_in, fan_out, stride)
    return nn.Sequential(first, *(BasicBlock(fan_out, fan_out, 1) for _ in range(blocks - 1)))
