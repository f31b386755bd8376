"""What people have as data, and what ``federate`` makes of it."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated.adapters import columns, image_tensor
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.partition import ByKey, Shards
from tests.federated.worlds import blobs, cross_entropy, linear, sgd

PIXELS = np.arange(10 * 2 * 3, dtype=np.uint8).reshape(10, 2, 3)
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@pytest.fixture
def inline():
    with Cluster(2, transport="inline") as cluster:
        yield cluster


def together(data):
    """All rows of all clients, in the order of the clients."""
    pairs = [(x.fetch(), y.fetch()) for x, y in (data[client] for client in data.clients)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def in_order(labels, clients, rng):
    return np.array_split(np.arange(len(labels)), clients)


class Image:
    """Looks like an image of PIL, for numpy too."""

    def __init__(self, array):
        self._array = np.ascontiguousarray(array)

    def getbands(self):
        return ("L",)

    @property
    def __array_interface__(self):
        return {**self._array.__array_interface__, "data": self._array.tobytes()}


class Vision:
    """As of torchvision: a pair of an image of PIL and an int, or what a transform makes of it."""

    classes = ("zero", "one", "two")

    def __init__(self, transform=None, target_transform=None):
        self.transform, self.target_transform = transform, target_transform

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        image, target = Image(PIXELS[index]), LABELS[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class Hub:
    """As of Hugging Face: dicts by number, columns by name, dicts of lists by slice."""

    def __init__(self, columns, form=None):
        self._columns, self._form = columns, form

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return [self._formatted(value) for value in self._columns[key]]
        if isinstance(key, slice):
            return {name: self[name][key] for name in self._columns}
        return {name: self._formatted(values[key]) for name, values in self._columns.items()}

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    @property
    def column_names(self):
        return list(self._columns)

    def with_format(self, form):
        return Hub(self._columns, form)

    def select_columns(self, names):
        return Hub({name: self._columns[name] for name in names}, self._form)

    def _formatted(self, value):
        value = np.array(value) if isinstance(value, Image) and self._form else value
        return {None: lambda v: v, "torch": torch.as_tensor, "numpy": np.asarray}[self._form](value)


def hub(**more):
    return Hub({**more, "image": [Image(pixels) for pixels in PIXELS], "label": LABELS})


# ---------------------------------------------------------------- torch


class Squares(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index, index**2], dtype=torch.float32), index % 2


def test_a_map_style_dataset_of_pairs(inline):
    x, y = together(federate(Squares(), inline, partition=in_order))
    assert x.tolist() == [[n, n**2] for n in range(6)]
    assert (y.tolist(), y.dtype) == ([0, 1, 0, 1, 0, 1], torch.int64)


def test_parts_of_datasets_are_datasets(inline):
    parts = random_split(Squares(), [2, 4], generator=torch.Generator().manual_seed(0))
    x, _ = together(federate(parts[1], inline, partition=in_order))
    assert x[:, 0].tolist() == [float(n) for n in parts[1].indices]
    both = ConcatDataset([Subset(Squares(), [5, 0]), Squares()])
    assert together(federate(both, inline, partition=in_order))[0][:3, 0].tolist() == [5, 0, 0]


def test_a_tensor_dataset_is_shared_and_not_read_row_by_row(inline):
    x, y = blobs(10)
    whole = TensorDataset(x, y)
    assert torch.equal(together(federate(whole, inline, partition=in_order))[0], x)
    with pytest.raises(ValueError, match="not a pair"):
        federate(TensorDataset(x, x, y), inline)


def test_explicit_clients_may_each_be_a_dataset(inline):
    data = FederatedDataset({"a": Squares(), "b": blobs(4, features=2)}, inline)
    assert data.sizes == {"a": 6, "b": 4}


# ---------------------------------------------------------------- scikit-learn


def test_sets_of_scikit_learn(inline):
    x, y = load_digits(return_X_y=True)
    found = together(federate((x, y), inline, clients=7, partition=in_order))
    assert np.array_equal(found[0].numpy(), x)
    assert np.array_equal(found[1].numpy(), y)
    assert (found[0].dtype, found[1].dtype) == (torch.float64, torch.int64)


def test_a_bunch_names_its_parts(inline):
    bunch = load_breast_cancer()
    data = federate((bunch.data, bunch.target), inline, clients=9, partition=Shards(2))
    assert sum(data.sizes.values()) == 569
    with pytest.raises(ValueError, match="Bunch"):
        federate(bunch, inline)


def test_regression_targets_split_by_rows_and_by_key(inline):
    x, y = load_diabetes(return_X_y=True)
    keys = np.where(x[:, 1] > 0, "m", "w")
    data = federate((x, y), inline, partition=ByKey(keys))
    assert data.sizes == {"m": int((keys == "m").sum()), "w": int((keys == "w").sum())}
    assert np.array_equal(data["w"][1].fetch().numpy(), y[keys == "w"])


# ---------------------------------------------------------------- torchvision


def test_images_and_ints_as_they_are(inline):
    x, y = together(federate(Vision(), inline, partition=in_order))
    assert x.dtype is torch.uint8
    assert np.array_equal(x.numpy(), PIXELS)
    assert y.tolist() == LABELS


def test_transforms_of_the_dataset_are_applied(inline):
    dataset = Vision(image_tensor, lambda target: target + 1)
    x, y = together(federate(dataset, inline, partition=in_order))
    assert torch.equal(x, torch.tensor(PIXELS / 255, dtype=torch.float32).unsqueeze(1))
    assert y.tolist() == [label + 1 for label in LABELS]


def test_columns_makes_tensors_of_images(inline):
    x, y = together(federate(columns(Vision(), 0, 1), inline, partition=in_order))
    assert torch.equal(x, torch.tensor(PIXELS / 255, dtype=torch.float32).unsqueeze(1))
    assert y.tolist() == LABELS


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("target", ["label", "labels", "target", "targets", "y"])
@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_two_columns_by_name_whatever_their_order(inline, target, turned):
    images = hub()["image"]
    both = {target: LABELS, "image": images} if turned else {"image": images, target: LABELS}
    x, y = together(federate(Hub(both), inline, partition=in_order))
    assert (x.dtype, x.shape, y.tolist()) == (torch.uint8, (10, 2, 3), LABELS)


@pytest.mark.parametrize("names", [("a", "b"), ("label", "target")])
def test_two_columns_whose_meaning_is_not_said_are_refused(inline, names):
    dataset = Hub(dict.fromkeys(names, LABELS))
    with pytest.raises(ValueError, match=r"not a pair.*fedproc\.columns"):
        federate(dataset, inline)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_formats(inline, form):
    x, y = together(federate(hub().with_format(form), inline, partition=in_order))
    assert np.array_equal(x.numpy(), PIXELS)
    assert y.tolist() == LABELS


def test_a_pair_of_columns(inline):
    dataset = hub(id=list(range(10)))
    pair = (np.stack(dataset.with_format("numpy")["image"]), dataset["label"])
    assert together(federate(pair, inline, partition=in_order))[1].tolist() == LABELS


def test_columns_are_chosen_by_name_whatever_their_order_and_number(inline):
    dataset = Hub({"label": LABELS, "id": list("abcdefghij"), "image": hub()["image"]})
    with pytest.raises(ValueError, match="not a pair"):
        federate(dataset, inline)
    x, y = together(federate(columns(dataset, "image", "label"), inline, partition=in_order))
    assert torch.equal(x, torch.tensor(PIXELS / 255, dtype=torch.float32).unsqueeze(1))
    assert y.tolist() == LABELS


def test_a_transform_makes_inputs_of_anything(inline):
    dataset = Hub({"text": ["a", "bb", "ccc"], "label": [0, 1, 1]})
    with pytest.raises(ValueError, match="must be numbers"):
        federate(dataset, inline)
    x, y = columns(dataset, "text", "label", transform=lambda text: [float(len(text)), 1.0])
    assert (x.tolist(), y.tolist()) == ([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], [0, 1, 1])


def test_the_rows_train_and_evaluate(inline):
    pair = columns(hub(), "image", "label", transform=lambda i: image_tensor(i).flatten())
    data = FederatedDataset.from_factories({"a": lambda: pair, "b": lambda: pair}, inline)
    history = Aggregator(linear(), data, LocalTraining(cross_entropy, sgd)).run(2, evaluate_on=pair)
    assert history[-1].failures == {}
    assert history[-1].evaluation.examples == 10


# ---------------------------------------------------------------- what is refused


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"row 0 .*no 'img'.*'image', 'label'"):
        columns(hub(), "img", "label")
    with pytest.raises(ValueError, match=r"row 0 .*no 2; it has 2 parts"):
        columns(Vision(), 0, 2)


def test_a_dict_of_splits_says_to_choose_one():
    with pytest.raises(ValueError, match=r"choose one of \['train', 'test'\]"):
        columns({"train": hub(), "test": hub()}, "image", "label")
    with pytest.raises(ValueError, match="generator"):
        columns((row for row in hub()), "image", "label")


def test_images_of_unlike_size_are_refused():
    dataset = Hub({"image": [Image(PIXELS[0]), Image(PIXELS[0][:1])], "label": [0, 1]})
    with pytest.raises(ValueError, match="do not all have one shape"):
        columns(dataset, "image", "label")


@pytest.mark.parametrize(
    ("array", "shape", "largest"),
    [
        (np.full((2, 3), 255, np.uint8), (1, 2, 3), 1.0),
        (np.full((2, 3, 4), 51, np.uint8), (4, 2, 3), 51 / 255),
        (np.full((2, 3), True), (1, 2, 3), 1.0),
        (np.full((2, 3, 1), 0.25), (1, 2, 3), 0.25),
        (np.full((2, 3), 32767, np.int16), (1, 2, 3), 1.0),
    ],
)
def test_images_become_channels_first_from_zero_to_one(array, shape, largest):
    found = image_tensor(array)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
    assert found.max().item() == np.float32(largest)


def test_real_images_of_pil():
    images = pytest.importorskip("PIL.Image")
    picture = images.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    x, _ = columns([(picture, 1)], 0, 1)
    assert torch.equal(x[0], torch.arange(18.0).reshape(2, 3, 3).permute(2, 0, 1) / 255)
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        image_tensor(np.zeros(3))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_of_what_torch_picks_no_rows_is_refused_with_the_way(inline, dtype):
    rows = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=rf"^y is of {dtype}, .* give y\.long\(\)"):
        federate((rows, torch.zeros(4, dtype=dtype)), inline)
    with pytest.raises(ValueError, match=rf"^client 'a': x is of {dtype}, .* give x\.long\(\)"):
        FederatedDataset({"a": (rows.to(dtype), torch.zeros(4))}, inline)
