"""Composed scores against closed forms of Gaussians, in float64."""

import pytest
import torch

from dipole.diffusion import (
    DDIM,
    EDM,
    VP,
    ClassifierFree,
    ContinuousVP,
    Flow,
    GaussianDenoiser,
    MixtureDenoiser,
    sample,
    to_epsilon,
    to_score,
    to_x0,
)
from dipole.diffusion.guidance import Composition, Selected, SpaceView
from dipole.diffusion.guidance.composition import one_scale
from dipole.diffusion.prediction import PREDICTION_TYPES, to_output
from dipole.diffusion.process_view import ProcessView

FLOW, VPC = Flow(), ContinuousVP()
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
OTHER_COV = torch.tensor([[0.2, -0.1], [-0.1, 0.4]], dtype=torch.float64)
M1, M2 = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([-0.3, 0.8], dtype=torch.float64)


def points(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two(process, cov=COV, other=COV):
    return GaussianDenoiser(M1, cov, process), GaussianDenoiser(M2, other, process)


def forks(process):
    left = MixtureDenoiser(torch.ones(2), torch.stack([M1, -M1]), 0.2, process)
    right = MixtureDenoiser(torch.ones(2), torch.stack([M2, -M2]), 0.3, process)
    return left, right


@pytest.mark.parametrize("process", [FLOW, VP.cosine(20), EDM()], ids=lambda p: type(p).__name__)
def test_all_the_weight_on_a_parent_is_that_parent_bit_for_bit(process):
    parents = forks(process)
    init, levels = points(8, 2), process.levels(7)
    for weights, parent in (((1.0, 0.0), parents[0]), ((0.0, 1.0), parents[1])):
        composed = sample(Composition(parents, weights), process, levels, init=init)
        assert torch.equal(composed, sample(parent, process, levels, init=init))


@pytest.mark.parametrize("spans", [(), ((0, 1), (0, 1))], ids=["whole", "spans"])
def test_a_parent_composed_with_itself_is_itself_for_all_weights(spans):
    parent = forks(FLOW)[0]
    x = points(8, 1, 2)
    for weight in (0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0):
        composed = Composition((parent, parent), (weight, 1 - weight), spans)
        assert torch.equal(composed(x, 0.6), parent(x, 0.6))


def test_a_parent_without_weight_is_not_called():
    def broken(x, t, cond=None):
        raise AssertionError

    parent = forks(FLOW)[0]
    assert torch.equal(Composition((broken, parent), (0.0, 1.0))(points(3, 2), 0.5), parent(points(3, 2), 0.5))


@pytest.mark.parametrize("process", [FLOW, VPC], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", [*PREDICTION_TYPES, "score"])
def test_composing_in_any_prediction_type_is_the_same_step(process, kind):
    parents, weights, t = forks(process), (0.3, 0.7), 0.4
    x = points(8, 2)
    answers = [parent(x, t) for parent in parents]
    if kind == "score":
        mixed = sum(w * to_score(answer, x, t, process) for w, answer in zip(weights, answers, strict=True))
        alpha, sigma = process.alpha(t), process.sigma(t)
        expected = (x + sigma**2 * mixed) / alpha
    else:
        mixed = sum(w * to_output(answer, x, t, process, kind) for w, answer in zip(weights, answers, strict=True))
        expected = to_x0(mixed, x, t, process, kind)
    # linear maps in float64
    assert torch.allclose(Composition(parents, weights)(x, t), expected, atol=1e-12)


@pytest.mark.parametrize("weight", [0.25, 0.6])
def test_gaussians_of_equal_covariance_compose_to_the_gaussian_between_them(weight):
    composed = Composition(two(FLOW), (weight, 1 - weight))
    between = GaussianDenoiser(weight * M1 + (1 - weight) * M2, COV, FLOW)
    init = points(50, 2)
    runs = [sample(d, FLOW, FLOW.levels(30), init=init) for d in (composed, between)]
    assert torch.allclose(*runs, atol=1e-12)


def test_without_noise_the_score_is_that_of_the_product_of_powers_and_with_noise_it_is_not():
    weight, x = 0.3, points(20, 2)
    composed = Composition(two(FLOW, COV, OTHER_COV), (weight, 1 - weight))
    precision = weight * torch.linalg.inv(COV) + (1 - weight) * torch.linalg.inv(OTHER_COV)
    pull = weight * torch.linalg.solve(COV, M1) + (1 - weight) * torch.linalg.solve(OTHER_COV, M2)
    product = GaussianDenoiser(torch.linalg.solve(precision, pull), torch.linalg.inv(precision), FLOW)
    t = 1e-5
    # alpha = 1 - t moves the scores, which are of order 1 to 10, by about 1e-4
    assert torch.allclose(to_score(composed(x, t), x, t, FLOW), pull - x @ precision, atol=1e-3)
    assert float((composed(x, 0.5) - product(x, 0.5)).abs().max()) > 0.01


@pytest.mark.parametrize("own", [FLOW, EDM(sigma_max=1e4)], ids=lambda p: type(p).__name__)
def test_a_flow_and_a_diffusion_of_one_gaussian_agree_at_equal_noise(own):
    """Heterogeneous parents: seen at equal log-SNR they give the same eps, so any mixture is the Gaussian itself."""
    seen = ProcessView(GaussianDenoiser(M1, COV, own), own, VPC)
    direct = GaussianDenoiser(M1, COV, VPC)
    x = points(20, 2)
    for t in (0.05, 0.5, 0.9):
        assert torch.allclose(to_epsilon(seen(x, t), x, t, VPC), to_epsilon(direct(x, t), x, t, VPC), atol=1e-9)
    composed = sample(Composition((seen, direct), (0.4, 0.6)), VPC, VPC.levels(20), init=x)
    assert torch.allclose(composed, sample(direct, VPC, VPC.levels(20), init=x), atol=1e-8)


def test_a_flow_and_a_diffusion_compose_to_the_gaussian_between_them():
    seen = ProcessView(GaussianDenoiser(M1, COV, FLOW), FLOW, VPC)
    composed = Composition((seen, GaussianDenoiser(M2, COV, VPC)), (0.4, 0.6))
    between = GaussianDenoiser(0.4 * M1 + 0.6 * M2, COV, VPC)
    init = points(20, 2)
    runs = [sample(d, VPC, VPC.levels(20), init=init) for d in (composed, between)]
    assert torch.allclose(*runs, atol=1e-8)


@pytest.mark.parametrize("own", [FLOW, VPC, EDM(sigma_max=1e4)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("scale", [2.5, -0.4])
def test_one_scale_and_any_offset_are_seen_through_exactly(own, scale):
    offset = torch.tensor([0.7, -1.2], dtype=torch.float64)
    # own = scale * other + offset
    seen = SpaceView(
        GaussianDenoiser(scale * M1 + offset, scale**2 * COV, own), own, VPC, torch.full((2,), scale).double(), offset
    )
    direct = GaussianDenoiser(M1, COV, VPC)
    x, levels = points(4, 2), torch.tensor([0.02, 0.3, 0.6, 0.95], dtype=torch.float64)
    assert torch.allclose(seen(x, levels), direct(x, levels), atol=1e-9)
    for k, t in enumerate(levels.tolist()):
        assert torch.allclose(seen(x, t)[k], direct(x, t)[k], atol=1e-9)


def test_pure_noise_is_handed_on_as_noise():
    """At level 1 of a flow there is no signal; a VP parent in other units still gets noise of its own size."""
    asked = []

    def own(x, t, cond=None):
        asked.append((x, t))
        return x

    x = points(5, 2)
    process = VP.cosine(50)
    SpaceView(own, process, FLOW, torch.full((2,), 3.0), torch.zeros(2))(x, 1.0)
    assert asked[0][1] == process.noisiest
    assert torch.allclose(asked[0][0], x * process.sigma(process.noisiest), atol=1e-12)


def test_which_scales_are_one():
    assert one_scale(torch.tensor([2.0, 2.0]), 0.0)
    assert one_scale(torch.tensor([-2.0, -2.0]), 1e-6)
    assert one_scale(torch.tensor([1.0, 1.01]), 0.01)
    assert not one_scale(torch.tensor([1.0, 1.1]), 0.01)
    assert not one_scale(torch.tensor([1.0, -1.0]), 0.5)


def test_the_overlap_is_composed_and_the_rest_is_the_longer_parents():
    short, long = torch.randn(3, 2).double(), torch.randn(5, 2).double()
    parents = (GaussianDenoiser(long, 0.5, FLOW), GaussianDenoiser(short, 0.5, FLOW))
    composed = Composition(parents, (0.3, 0.7), ((0, 5), (1, 4)))
    x, t = points(6, 5, 2), 0.4
    answer = composed(x, t)
    a, b = parents[0](x, t), parents[1](x[:, 1:4], t)
    assert torch.allclose(answer[:, 1:4], 0.3 * a[:, 1:4] + 0.7 * b, atol=1e-12)
    assert torch.equal(answer[:, [0, 4]], a[:, [0, 4]])
    alone = Composition(parents, (0.0, 1.0), ((0, 5), (1, 4)))(x, t)
    assert torch.equal(alone[:, 1:4], b)
    assert torch.equal(alone[:, [0, 4]], a[:, [0, 4]])


def test_levels_per_position_go_with_the_positions():
    parents = (GaussianDenoiser(torch.zeros(4, 1), 0.5, FLOW), GaussianDenoiser(torch.ones(2, 1), 0.5, FLOW))
    composed = Composition(parents, (0.5, 0.5), ((0, 4), (2, 4)))
    x, t = points(3, 4, 1), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double().expand(3, 4)
    expected = (parents[0](x, t)[:, 2:] + parents[1](x[:, 2:], t[:, 2:])) / 2
    assert torch.allclose(composed(x, t)[:, 2:], expected, atol=1e-12)


def test_product_form_is_classifier_free_guidance():
    def parent(x, t, cond=None):
        return x + cond["goal"]

    cond, x = {"goal": torch.tensor([[1.0, 2.0]])}, torch.zeros(1, 2)
    guided = ClassifierFree(parent, 3.0)(x, 0.5, cond)
    product = Composition.product(lambda x, t, cond=None: x, [parent], [3.0])
    assert torch.allclose(product(x, 0.5, cond), guided)


def test_each_parent_finds_its_own_conditioning():
    def parent(x, t, cond=None):
        return x + sum(cond.values())

    cond = {"0/obs": torch.tensor([[1.0]]), "1/obs": torch.tensor([[10.0]]), "1/goal": torch.tensor([[5.0]])}
    composed = Composition((Selected(parent, "0/"), Selected(parent, "1/")), (0.5, 0.5))
    assert float(composed(torch.zeros(1, 1), 0.5, cond)) == pytest.approx((1 + 15) / 2)
    # `sample` prepares every parent for its own part
    assert sample(composed, FLOW, FLOW.levels(2), DDIM(), cond=cond, init=torch.zeros(1, 1)).shape == (1, 1)


@pytest.mark.parametrize(
    ("weights", "spans", "says"),
    [
        ((0.5, 0.6), (), "sum to 1"),
        ((1.0,), (), "as many weights"),
        ((1.5, -0.5), ((0, 1), (0, 1)), "negative"),
    ],
)
def test_weights_that_do_not_fit(weights, spans, says):
    with pytest.raises(ValueError, match=says):
        Composition(forks(FLOW), weights, spans)


def test_spans_that_leave_a_gap():
    with pytest.raises(ValueError, match="none of the spans"):
        Composition(forks(FLOW), (0.5, 0.5), ((0, 1), (2, 3)))(points(2, 3, 2), 0.5)
