import pytest
import torch
from torch.utils.data import DataLoader

from sosp_hub.data.labels import label_order
from sosp_hub.data.loading import calibration_batches, load_split, make_loader
from sosp_hub.data.source import open_data
from sosp_hub.recipe.schema import DataSection
from tests.compare import assert_close


@pytest.fixture
def split(idx_folder, processing):
    data = open_data(DataSection(path=str(idx_folder)), "image-classification")
    return load_split(data, "train", processing(mean=(0.0,), std=(1 / 255,)))


def names(batches):
    """What tells the images apart: their first pixels."""
    return [tuple(image.flatten()[:6].tolist()) for images, _ in batches for image in images]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_holds_every_sample_once(split, num_workers):
    loader = make_loader(split, 5, shuffle=True, num_workers=num_workers)
    assert isinstance(loader, DataLoader)
    assert [len(labels) for _, labels in loader] == [5, 5, 2]
    first, second = names(loader), names(loader)
    assert sorted(first) == sorted(second) == sorted(names([split.__getitems__(range(12))]))
    assert first != second
    assert names(make_loader(split, 5, shuffle=True)) == names(make_loader(split, 5, shuffle=True))
    assert len(make_loader(split, 5, drop_last=True)) == 2


def test_one_sample_is_a_batch_of_one(split):
    images, labels = split[3]
    assert_close(images, split.__getitems__([3])[0], relative=0)
    assert labels.shape == (1,)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_the_same_calibration_batches(split, num_processes):
    whole = calibration_batches(split, 7, 3, seed=5)
    assert [len(labels) for _, labels in whole] == [3, 3, 1]
    for rank in range(num_processes):
        share = calibration_batches(split, 7, 3, seed=5, rank=rank, num_processes=num_processes)
        expected = list(whole)[rank::num_processes]
        assert len(share) == len(expected) > 0
        for mine, batch in zip(share, expected, strict=True):
            assert_close(mine, batch, relative=0)


def test_calibration_can_be_read_twice_and_depends_on_the_seed(split):
    batches = calibration_batches(split, 7, 3, seed=5)
    assert names(batches) == names(batches) == names([*batches[:2], *batches[2:]])
    assert set(names(batches)) != set(names(calibration_batches(split, 7, 3, seed=6)))
    assert len(names(calibration_batches(split, 100, 3))) == 12


@pytest.mark.parametrize(
    ("data", "model", "order"),
    [
        (("neg", "pos"), ("POS", "NEG"), (1, 0)),
        (("neg", "pos"), ("NEG", "POS"), None),
        (("neg", "pos"), ("LABEL_0", "LABEL_1"), None),
        (("a", "b", "c"), ("c", "a", "b"), (1, 2, 0)),
        (("a", "A"), ("A", "b"), None),
    ],
)
def test_classes_of_the_same_name_meet(data, model, order):
    assert label_order(data, model) == order


def test_tensors_stay_small(split):
    assert split._pixels.dtype == torch.uint8
