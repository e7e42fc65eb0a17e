"""Procedural handwriting: format (as MNIST), statistics, determinism, speed. About 6 s on one core."""

import time

import pytest
import torch

import datasets
from datasets import strokes

LABELS = torch.arange(len(strokes.CLASSES)).repeat(30)  # 1080 pictures


@pytest.fixture(scope="module")
def pictures():
    return strokes.draw(LABELS, torch.Generator().manual_seed(0))


def test_shape_type_and_range(pictures):
    assert pictures.shape == (len(LABELS), 1, 28, 28) and pictures.dtype == torch.uint8
    assert (pictures.amax((1, 2, 3)) > 200).all(), "every picture has solid ink"
    border = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., :, 0], pictures[..., :, -1]],
                       -1)
    assert (border > 0).float().mean() < 0.001, "ink stays inside, up to rare one-sided shapes"
    ink = pictures.float().mean() / 255
    assert 0.06 < ink < 0.2, f"mean grey {ink:.3f} is not a pen of 2 to 3.5 pixels"
    grey = ((pictures > 20) & (pictures < 235)).float().sum() / (pictures > 20).float().sum()
    assert 0.2 < grey < 0.7, "edges are antialiased, cores are solid"


def test_ink_fits_a_box_of_twenty_pixels(pictures):
    ink = pictures[:, 0] >= 128
    height = ink.any(2).sum(1)  # rows with ink; letters like i have gaps, so a lower bound of the box
    width = ink.any(1).sum(1)
    longer = torch.maximum(height, width).float()
    assert longer.max() <= 21
    assert longer.median() >= 19 and (longer >= 18).float().mean() > 0.9


def test_centre_of_mass_is_the_centre_of_the_picture(pictures):
    mass = pictures[:, 0].double()
    axis = torch.arange(28).double() - 13.5
    x = (mass.sum(1) * axis).sum(1) / mass.sum((1, 2))
    y = (mass.sum(2) * axis).sum(1) / mass.sum((1, 2))
    off = torch.stack([x, y]).abs()
    assert off.max() < 2 and off.mean() < 0.5
    assert abs(x.mean()) < 0.2 and abs(y.mean()) < 0.2


def test_same_seed_same_pictures_and_labels_are_followed_one_by_one():
    first, again, other = (strokes.draw(LABELS[:72], torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first != other).flatten(1).any(1).all()
    assert strokes.draw(torch.zeros(0, dtype=torch.long)).shape == (0, 1, 28, 28)


def test_no_two_pictures_of_a_class_are_alike(pictures):
    for label in range(len(strokes.CLASSES)):
        assert len(pictures[label == LABELS].flatten(1).unique(dim=0)) == 30


def test_every_class_can_be_told_from_every_other(pictures):
    """The mean images all differ, and a linear reader of a few hundred is far above chance on fresh ones."""
    means = torch.stack([pictures[label == LABELS].float().mean(0).flatten() for label in range(36)])
    distance = torch.cdist(means, means) + 1e9 * torch.eye(36)
    assert distance.min() > 200
    train = torch.arange(10).repeat(60)
    x = strokes.draw(train, torch.Generator().manual_seed(1)).flatten(1).double() / 255
    fresh = strokes.draw(train, torch.Generator().manual_seed(2)).flatten(1).double() / 255
    ridge = torch.linalg.solve(x.T @ x + 10 * torch.eye(784).double(), x.T @ torch.eye(10).double()[train])
    answer = (fresh @ ridge).argmax(1)
    assert (answer == train).double().mean() > 0.7
    for digit in range(10):
        assert (answer == digit)[train == digit].double().mean() > 0.4, digit


def test_two_or_more_ways_of_writing_every_digit_and_a_well_formed_skeleton_for_every_class():
    assert list(strokes.SKELETONS) == list(strokes.CLASSES)
    for name, variants in strokes.SKELETONS.items():
        assert len(variants) >= 2 and len(set(variants)) == len(variants), name
    assert ((strokes.compiled()[3] > 0).sum(0) == 1).all(), "each skeleton belongs to one class"
    # points are affine combinations of control points: the skeleton moves as one
    rows = strokes.compiled()[2].sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def test_other_sizes_show_the_same_handwriting():
    small, large = (strokes.draw(LABELS[:36], torch.Generator().manual_seed(3), size=s).double()
                    for s in (28, 56))
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert halved.shape == small.shape and (halved - small).abs().mean() < 8


def test_labels_out_of_range_are_refused():
    for bad in ([36], [-1]):
        with pytest.raises(ValueError, match="0..35"):
            strokes.draw(torch.tensor(bad))


@pytest.mark.parametrize("group, count, first", [("digits", 10, 0), ("letters", 26, 10), ("all", 36, 0)])
def test_load_balances_the_classes_and_counts_labels_from_zero(group, count, first):
    drawn = datasets.load("strokes", public_classes=group, n=5 * count + 3, seed=1)
    assert drawn.images.shape == (5 * count + 3, 1, 32, 32) and drawn.labels.dtype == torch.int64
    tally = drawn.labels.bincount(minlength=count)
    assert tally.min() == 5 and tally.max() == 6 and len(tally) == count
    assert "".join(drawn.classes) == strokes.CLASSES[first : first + count]
    assert not torch.equal(drawn.labels, torch.arange(len(drawn)) % count), "random order"
    again = datasets.load("strokes", public_classes=group, n=5 * count + 3, seed=1)
    assert torch.equal(drawn.images, again.images) and torch.equal(drawn.labels, again.labels)


def test_load_draws_the_class_that_the_label_names():
    """Letters loaded as 0..25 are letters: nearer to their own mean than to that digit's."""
    drawn = datasets.load("strokes", size=28, public_classes="letters", n=520, seed=0)

    def mean(label):
        return strokes.draw(torch.full((100,), label), torch.Generator().manual_seed(9)).float().mean(0)

    for label, name in [(2, "c"), (8, "i"), (12, "m"), (25, "z")]:
        found = drawn.images[drawn.labels == label].float().mean(0)
        assert (found - mean(strokes.CLASSES.index(name))).norm() < 0.8 * (found - mean(label)).norm(), name


def test_speed():
    """2,000 pictures/s on two idle cores; the floor is generous because a test machine may be busy."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        strokes.draw(LABELS[:512])
        rates.append(512 / (time.perf_counter() - start))
    assert max(rates) > 300, f"{max(rates):.0f} pictures/s"
