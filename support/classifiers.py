"""The classifiers that metrics.py trains on samples."""
from torch import nn

# The three kinds of DPImageBench, each with eight blocks: torchvision's ResNet with these arguments.
RESIDUAL = {"resnet": {"block": "BasicBlock"},
            "wideresnet": {"block": "Bottleneck", "width_per_group": 128},
            "resnext": {"block": "Bottleneck", "groups": 32, "width_per_group": 4}}


def network(kind, channels, size, classes):
    """An untrained classifier of images (N, channels, size, size) in -1..1. Its last layer is linear.

    small-cnn has 0.43 M parameters; it reaches 98 % when trained on 8,000 real digits. The others are those
    of DPDM's script: paper-cnn (from 18 pixels), mlp, logreg; and those of RESIDUAL. ValueError for another
    kind or too few pixels.
    """
    if kind in RESIDUAL:
        return residual(kind, channels, classes)
    # Height and width before Flatten: two poolings; or two 3x3 convolutions with poolings, and one without.
    side = size // 4 if kind == "small-cnn" else ((size - 2) // 2 - 2) // 2 - 2
    if kind == "small-cnn":
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(64 * side ** 2, 128), nn.ReLU(), nn.Linear(128, classes))
    if kind == "paper-cnn" and side > 0:
        return nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128 * side ** 2, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes))
    if kind == "mlp":
        hidden = nn.Linear(channels * size ** 2, 100)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(100, classes))
    if kind == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size ** 2, classes))
    raise ValueError(f"no classifier {kind!r} for images of {size} pixels: use small-cnn, paper-cnn, mlp, "
                     f"logreg, {', '.join(RESIDUAL)}")


def residual(kind, channels, classes):
    """A network of RESIDUAL for small images: its first layer keeps their size, and nothing is pooled there.

    Its normalisation is over the batch, which is fine for a classifier: DP-SGD never sees it.
    """
    from torchvision.models import resnet
    arguments = dict(RESIDUAL[kind])
    block = getattr(resnet, arguments.pop("block"))
    model = resnet.ResNet(block, [2, 2, 2, 2], num_classes=classes, **arguments)
    model.conv1, model.maxpool = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    return model
