"""The data of the course: real, seeded, and in the repository."""

import torch

from course_lib.data import digits, text


def test_digits_are_1797_images_each_in_one_of_the_two_sets() -> None:
    data = digits()
    assert data.x_train.shape == (1437, 64)
    assert data.x_test.shape == (360, 64)
    assert len(data.y_train) == 1437 and len(data.y_test) == 360
    assert data.x_train.min() == 0 and data.x_train.max() == 1
    assert sorted(set(data.y_test.tolist())) == list(range(10))


def test_digits_come_in_the_same_order_whatever_the_seed() -> None:
    torch.manual_seed(1)
    first = digits()
    torch.manual_seed(2)
    assert torch.equal(first.x_train, digits().x_train)


def test_text_can_be_encoded_and_decoded() -> None:
    corpus = text()
    assert corpus.decode(corpus.encode("We the People")) == "We the People"
    assert corpus.decode(corpus.tokens).startswith("The Declaration of Independence")


def test_targets_are_the_inputs_one_character_later() -> None:
    inputs, targets = text().batch(size=5, length=12, seed=3)
    assert inputs.shape == targets.shape == (5, 12)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_seed_names_a_batch() -> None:
    corpus = text()
    assert torch.equal(corpus.batch(4, 8, seed=1)[0], corpus.batch(4, 8, seed=1)[0])
    assert not torch.equal(corpus.batch(4, 8, seed=1)[0], corpus.batch(4, 8, seed=2)[0])


def test_digits_are_those_of_scikit_learn() -> None:
    """Counted once in scikit-learn's copy of them."""
    data = digits()
    pixels = torch.cat([data.x_test, data.x_train]) * 16
    labels = torch.cat([data.y_test, data.y_train])
    assert int(pixels.sum()) == 561_718
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
