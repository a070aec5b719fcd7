import pytest
import torch
from torch.utils.data import DataLoader

from sosp_hub.data.labels import label_order
from sosp_hub.data.loading import calibration_batches, load_split, make_loader
from sosp_hub.data.source import open_data
from sosp_hub.data.split import Part
from sosp_hub.errors import DataError
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


@pytest.mark.parametrize("num_processes", [1, 2])
def test_mixed_splits_calibrate_in_turn_and_in_equal_parts(split, num_processes):
    parts = [Part(split, range(start, stop)) for start, stop in ((0, 5), (5, 12), (2, 9))]
    batches = calibration_batches(parts, 12, 3, seed=5)
    every = names([split.__getitems__(range(12))])
    homes = [{every.index(name) for name in names([batch])} for batch in batches]
    assert [len(home) for home in homes] == [3, 3, 3, 1, 1, 1]
    for number, part in enumerate(parts):
        mine = sorted(homes[number] | homes[number + 3])
        assert len(mine) == 4
        assert set(mine) <= set(part.indices)
        alone = calibration_batches(part, 4, 3, seed=5)
        assert names(alone) == names([batches[number], batches[number + 3]])
    assert sum(len(labels) for _, labels in calibration_batches(parts, 99, 4)) == 15
    before, after = (
        calibration_batches(parts, stop, 3, start=start, seed=5)
        for start, stop in ((0, 7), (7, 12))
    )
    assert sorted(names(before) + names(after)) == sorted(names(batches))
    for rank in range(num_processes):
        share = calibration_batches(parts, 12, 3, seed=5, rank=rank, num_processes=num_processes)
        assert names(share) == names(list(batches)[rank::num_processes])


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
        (("cat", "ant"), ("ant", "bee", "cat"), (2, 0)),
        (("0", "1"), ("neg", "pos"), None),
    ],
)
def test_classes_of_the_same_name_meet(data, model, order):
    assert label_order(data, model) == order


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (("good", "schlecht ☹"), "neg = good, pos = schlecht ☹"),
        (("neg", "other"), "neg = neg, pos = other"),
        (("neg", "pos"), None),
        (("pos", "neg"), None),
        (("0", "1"), None),
    ],
)
def test_classes_of_other_names_are_told(data, told, caplog):
    """They were taken for the model's one after the other, without a word."""
    label_order(data, ("neg", "pos"))
    assert (told in caplog.text) if told else not caplog.text


def test_tensors_stay_small(split):
    assert split._pixels.dtype == torch.uint8


def test_each_split_has_as_many_samples_as_were_asked_for(idx_folder):
    for num_train, num_test in ((7, 3), (2, 5), (None, 1), (4, None)):
        section = DataSection(path=str(idx_folder), num_train=num_train, num_test=num_test)
        data = open_data(section, "image-classification")
        assert (len(data.train), len(data.test)) == (num_train or 12, num_test or 5)


@pytest.mark.parametrize("stem", ["train", "t10k"])
def test_a_split_without_samples_is_told_when_the_data_is_opened(idx_folder, write_idx, stem):
    write_idx(idx_folder / f"{stem}-images-idx3-ubyte.gz", torch.zeros(0, 8, 8))
    write_idx(idx_folder / f"{stem}-labels-idx1-ubyte", torch.zeros(0))
    split = {"train": "train", "t10k": "test"}[stem]
    with pytest.raises(DataError, match=f"the {split} split of idx is empty"):
        open_data(DataSection(path=str(idx_folder)), "image-classification")
