"""Drawn garments and shapes: format (as Fashion-MNIST), determinism, classes that differ. About 5 s."""

from functools import partial

import pytest
import torch

from datasets import drawing, garments

LABELS = torch.arange(10).repeat(30)
SETS = {"garments": garments.draw, "shapes": partial(garments.draw, classes=garments.SHAPES)}


@pytest.fixture(scope="module", params=SETS)
def drawn(request):
    draw = SETS[request.param]
    return draw, draw(LABELS, torch.Generator().manual_seed(0))


def test_shape_type_and_a_black_background(drawn):
    _, images = drawn
    assert images.shape == (len(LABELS), 1, 28, 28) and images.dtype == torch.uint8
    corners = images[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).float().mean() > 0.6, "things on black"
    assert (images == 0).float().mean() > 0.25
    assert (images.amax((1, 2, 3)) > 15).all(), "no image is empty"
    assert len(images.unique()) > 200, "many tones"


def test_the_longer_side_touches_two_borders(drawn):
    """Fashion-MNIST cuts its images to the garment: first and last row, or column, are in use."""
    _, images = drawn
    seen = images[:, 0] > 0
    rows, columns = seen.any(2), seen.any(1)
    ends = rows, rows.flip(1), columns, columns.flip(1)
    margin = torch.stack([used.float().argmax(1) for used in ends])  # (4,N), pixels left black
    longer = torch.minimum(margin[:2].amax(0), margin[2:].amax(0))
    assert (longer <= 1).float().mean() > 0.8, "at most a pixel is left at both ends, for most"
    assert longer.max() <= 5


def test_same_seed_same_images_and_another_seed_others(drawn):
    draw, _ = drawn
    first, again, other = (draw(LABELS[:40], torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first != other).flatten(1).any(1).all()
    assert draw(torch.zeros(0, dtype=torch.long)).shape == (0, 1, 28, 28)


def test_global_random_state_plays_no_part(drawn):
    draw, _ = drawn
    torch.manual_seed(1)
    first = draw(LABELS[:20], torch.Generator().manual_seed(2))
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(first, draw(LABELS[:20], torch.Generator().manual_seed(2)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state()), "nothing was drawn from it"


def test_no_two_images_of_a_class_are_alike(drawn):
    _, images = drawn
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_every_label_gets_its_own_kind(drawn):
    """Nearest class mean, taught by one seed, reads another seed in another order, far above chance."""
    draw, images = drawn
    means = torch.stack([images[label == LABELS].float().mean(0).flatten() for label in range(10)])
    mixed = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(4))]
    fresh = draw(mixed, torch.Generator().manual_seed(1)).flatten(1).float()
    right = torch.cdist(fresh, means).argmin(1) == mixed
    assert right.double().mean() > 0.5
    for label in set(range(10)) - {6}:  # a shirt looks like all others with sleeves
        assert right[mixed == label].double().mean() > 0.25, label
    distance = torch.cdist(means, means) + 1e9 * torch.eye(10)
    assert distance.min() > 100


def test_the_label_names_what_is_drawn():
    """By what everybody knows: trousers, dresses are long and narrow, shoes lie flat, boots reach higher."""
    used = garments.draw(LABELS, torch.Generator().manual_seed(0))[:, 0] > 0
    high, wide = used.any(2).sum(1).float(), used.any(1).sum(1).float()
    high, wide = ({name: of[label == LABELS].mean().item() for label, name in enumerate(garments.CLASSES)}
                  for of in (high, wide))
    for name in ("trouser", "dress"):
        assert high[name] > 26 and wide[name] < 20, name
    for name in ("T-shirt", "pullover", "coat", "shirt"):
        assert high[name] > 26 and wide[name] > 20, name
    for name in ("sandal", "sneaker", "ankle boot", "bag"):
        assert wide[name] > 24, name
    assert high["sneaker"] < 16 < 19 < high["ankle boot"]
    sleeves = used[..., 20:, :].any(1).sum(1).float()  # low down, only long sleeves are wider than the body
    assert sleeves[LABELS == 2].mean() > 1.2 * sleeves[LABELS == 0].mean(), "pullovers have long sleeves"


def test_shapes_are_mirrored_and_garments_share_no_class_with_them():
    shapes = SETS["shapes"](LABELS, torch.Generator().manual_seed(0)).float()
    mean = shapes.mean(0)
    assert (mean - mean.flip(-1)).abs().mean() < 0.1 * mean.mean()
    assert len(garments.SHAPES) == len(garments.CLASSES) == 10
    assert not set(garments.SHAPES) & set(garments.CLASSES)


def test_labels_out_of_range_are_refused(drawn):
    draw, _ = drawn
    for bad in ([10], [-1]):
        with pytest.raises(ValueError, match="0..9"):
            draw(torch.tensor(bad))


def test_signed_distance_of_a_polygon_agrees_with_a_square_and_a_notch():
    """Outside, inside and in a notch that is not convex: distances known from geometry."""
    square = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]]])
    x, y = torch.tensor([[2.0, 2.0, 6.0, 7.0, -1.0]]), torch.tensor([[2.0, 1.0, 2.0, 8.0, 4.0]])
    found = drawing.polygon(square, x, y)
    assert torch.allclose(found, torch.tensor([[-2.0, -1.0, 2.0, 5.0, 1.0]]), atol=1e-4)
    assert torch.allclose(drawing.polygon(square.flip(1), x, y), found, atol=1e-4), "either way round"
    notch = torch.tensor([[[0.0, 0.0], [2.0, 3.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]]])
    assert drawing.polygon(notch, torch.tensor([[2.0]]), torch.tensor([[1.0]])).item() > 0.9
    assert drawing.polygon(notch, torch.tensor([[2.0]]), torch.tensor([[3.5]])).item() < -0.4
    line = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [4.0, 3.0]]])
    assert torch.allclose(drawing.path(line, torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, 3.0]])),
                          torch.ones(1, 2), atol=1e-4)


def test_a_frame_lays_the_box_over_the_image():
    dice = drawing.Dice(3, torch.Generator().manual_seed(0))
    one = torch.ones(3, 1)
    x, y, pixel = drawing.frame(dice, (-one, 0 * one), (one, 8 * one), turn=0, wave=0)
    assert torch.allclose(pixel, torch.full((3, 1), 8 / 28))
    assert torch.allclose(y.amin(1) - pixel[:, 0] / 2, torch.zeros(3), atol=1e-4)
    assert torch.allclose(y.amax(1) + pixel[:, 0] / 2, torch.full((3,), 8.0), atol=1e-4)
    assert torch.allclose(x.amin(1), -x.amax(1), atol=1e-4)
