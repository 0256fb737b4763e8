import pytest
import torch

from advmoe.attacks import BatchDraws, ImageDraws, derive_seed
from advmoe.errors import UserError


def zeros(count):
    return torch.zeros(count, 3, 4, 4)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_an_images_noise_does_not_depend_on_its_batch(kind):
    together = getattr(ImageDraws(7, [4, 9, 2]), kind)(zeros(3))
    reordered = getattr(ImageDraws(7, [2, 4]), kind)(zeros(2))
    alone = getattr(ImageDraws(7, [9]), kind)(zeros(1))
    assert torch.equal(reordered, together[[2, 0]])
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_second_draws_differ_from_the_first_and_do_not_depend_on_the_batch(kind):
    together, alone = ImageDraws(7, [4, 9]), ImageDraws(7, [9])
    first, second = (getattr(together, kind)(zeros(2)) for _ in range(2))
    getattr(alone, kind)(zeros(1))
    assert not torch.equal(first, second)
    assert torch.equal(getattr(alone, kind)(zeros(1))[0], second[1])


def test_images_and_seeds_have_separate_noise():
    noise = ImageDraws(7, [4, 9]).uniform(zeros(2))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(ImageDraws(8, [4, 9]).uniform(zeros(2)), noise)
    assert torch.equal(ImageDraws(7, [4, 9]).uniform(zeros(2)), noise)


@pytest.mark.parametrize("make", [lambda: ImageDraws(0, range(2000)), lambda: BatchDraws(torch.Generator().manual_seed(0))])
def test_distributions(make):
    x = torch.zeros(2000, 1, 3, 3)
    uniform, normal = make().uniform(x), make().normal(x)
    assert uniform.shape == normal.shape == x.shape
    assert -1 <= uniform.min() < -0.99
    assert 0.99 < uniform.max() <= 1
    assert abs(uniform.mean()) < 0.02
    assert uniform.std() == pytest.approx(3**-0.5, abs=0.01)
    assert abs(normal.mean()) < 0.03
    assert normal.std() == pytest.approx(1, abs=0.02)


def test_noise_has_the_images_dtype():
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    assert ImageDraws(0, [0, 1]).uniform(x).dtype == torch.float64
    assert BatchDraws(torch.Generator()).normal(x).dtype == torch.float64


def test_no_images_draw_no_noise():
    assert ImageDraws(0, []).uniform(zeros(0)).shape == (0, 3, 4, 4)


def test_rows_of_a_batch_that_ranks_share_get_their_own_noise(monkeypatch):
    monkeypatch.setattr("advmoe.distributed.local_rows", lambda batch: slice(2, 4))  # of the second of two ranks
    draws, whole = (BatchDraws(torch.Generator().manual_seed(5)) for _ in range(2))
    draws.batch, everything = 4, whole.uniform(zeros(4))
    chosen = draws.rows(torch.tensor([1]))
    assert torch.equal(chosen.uniform(zeros(1)), everything[3:])
    assert torch.equal(chosen.rows(torch.tensor([0])).normal(zeros(1)), whole.normal(zeros(4))[3:])


def test_batch_draws_depend_only_on_their_generator():
    first = BatchDraws(torch.Generator().manual_seed(5)).normal(zeros(2))
    torch.manual_seed(123)
    torch.rand(3)
    assert torch.equal(BatchDraws(torch.Generator().manual_seed(5)).normal(zeros(2)), first)


def test_draws_do_not_change_the_global_generator():
    before = torch.get_rng_state()
    ImageDraws(0, [0, 1]).uniform(zeros(2))
    BatchDraws(torch.Generator()).normal(zeros(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_depend_on_every_number():
    seeds = [derive_seed(*numbers) for numbers in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (2**62, 5), (2**62, 6)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, 4) == derive_seed(3, 4)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_chosen_rows_continue_with_their_images_noise(kind):
    full_batch, chosen = ImageDraws(7, [4, 9, 2]), ImageDraws(7, [4, 9, 2])
    first, second = (getattr(full_batch, kind)(zeros(3)) for _ in range(2))
    rows = torch.tensor([2, 0])
    assert torch.equal(getattr(chosen.rows(rows), kind)(zeros(2)), first[rows])
    assert torch.equal(getattr(chosen.rows(rows), kind)(zeros(2)), second[rows])
    assert torch.equal(getattr(chosen, kind)(zeros(3))[1], first[1])  # the image that was not chosen has drawn nothing yet
    assert getattr(chosen.rows(rows[:0]), kind)(zeros(0)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("images", [[], [5]])
def test_noise_for_another_number_of_images_is_refused(images):
    with pytest.raises(UserError, match=f"noise of {len(images)} images? for a batch of 4"):
        ImageDraws(0, images).uniform(zeros(4))


def test_rows_of_batch_draws_are_drawn_from_the_same_generator():
    draws = BatchDraws(torch.Generator().manual_seed(5))
    first = draws.rows(torch.tensor([1])).normal(zeros(1))
    assert torch.equal(BatchDraws(torch.Generator().manual_seed(5)).normal(zeros(1)), first)
    assert not torch.equal(draws.normal(zeros(1)), first)
