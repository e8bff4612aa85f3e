import pytest
import torch

from dipole.diffusion import (
    CPS,
    DDIM,
    DDPM,
    EDM,
    VP,
    ClassifierFree,
    ConsistencyRenoise,
    DPMSolverPP2M,
    DPMSolverPP2S,
    Flow,
    GaussianDenoiser,
    GradientGuidance,
    Heun,
    Inpaint,
    NetworkDenoiser,
    drop_conditioning,
    sample,
)
from dipole.diffusion.guidance import by_step, gradient_of, hold, random_drop

F64 = torch.float64
SEEDED = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=SEEDED, dtype=F64)


COND = {"obs": normal(3, 2, 4), "goal": normal(3, 1, 2)}
X = normal(3, 5, 2)


class Told:
    """A denoiser that depends on its conditioning and counts its calls."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, cond):
        self.batches.append((x.shape[0], t, cond))
        level = torch.as_tensor(t, dtype=x.dtype)
        level = level.reshape(level.shape + (1,) * (x.dim() - level.dim()))
        return (
            x * (1 - 0.1 * level)
            + cond["obs"].mean((1, 2))[:, None, None]
            + 2 * cond["goal"].sum((1, 2))[:, None, None]
        )


# Classifier-free


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("keys", [None, ("goal",), ("obs", "goal")])
def test_guidance_extrapolates_in_one_forward(scale, keys):
    told, dropped = Told(), drop_conditioning(COND, keys)
    conditional, unconditional = Told()(X, 0.5, COND), Told()(X, 0.5, dropped)
    guided = ClassifierFree(told, scale, keys)(X, 0.5, COND)
    assert torch.allclose(guided, unconditional + scale * (conditional - unconditional), atol=1e-14)
    assert [batch for batch, _, _ in told.batches] == [3 if scale in (0.0, 1.0) else 6]


def test_scales_0_and_1_are_single_forwards_bit_for_bit():
    assert torch.equal(ClassifierFree(Told(), 1.0)(X, 0.5, COND), Told()(X, 0.5, COND))
    zero = {key: torch.zeros_like(value) for key, value in COND.items()}
    assert torch.equal(ClassifierFree(Told(), 0.0)(X, 0.5, COND), Told()(X, 0.5, zero))


@pytest.mark.parametrize(
    "level", [torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3]), normal(3, 5).abs(), normal(1, 5).abs()]
)
def test_levels_are_doubled_with_the_rows(level):
    level = level.double()
    unconditional, conditional = (Told()(X, level, cond) for cond in (drop_conditioning(COND), COND))
    guided = ClassifierFree(Told(), 3.0)(X, level, COND)
    assert torch.allclose(guided, 3 * conditional - 2 * unconditional, atol=1e-13)


def test_parts_are_guided_together():
    def denoiser(x, t, cond):
        shift = cond["goal"].sum((1, 2))
        return {"a": x["a"] + shift[:, None], "b": x["b"] * t["b"][:, None] - shift[:, None]}

    x = {"a": torch.ones(3, 2, dtype=F64), "b": torch.ones(3, 4, dtype=F64)}
    t = {"a": 0.1, "b": torch.tensor([0.1, 0.2, 0.3], dtype=F64)}
    guided = ClassifierFree(denoiser, 2.0)(x, t, COND)
    shift = 2.0 * COND["goal"].sum((1, 2))[:, None]
    assert torch.allclose(guided["a"], x["a"] + shift, atol=1e-14)
    assert torch.allclose(guided["b"], t["b"][:, None] - shift, atol=1e-14)


class Preparing:
    """A network that prepares, and that refuses to work unprepared or for other conditioning."""

    def __init__(self, prepared=None):
        self.prepared = prepared

    def prepare(self, times, cond):
        return Preparing((times, cond))

    def __call__(self, x, time, cond):
        times, ready = self.prepared
        assert {key: value.shape for key, value in ready.items()} == {key: value.shape for key, value in cond.items()}
        assert all(torch.equal(ready[key], cond[key]) for key in cond)
        assert len(x) == len(cond["goal"])
        assert any(torch.equal(t.expand_as(time), time) for t in times)
        return 0.1 * x + cond["goal"].sum((1, 2))[:, None, None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_prepare_reaches_the_network_through_every_wrapper(scale, per_row):
    process = Flow()
    guided = Inpaint(
        GradientGuidance(
            ClassifierFree(NetworkDenoiser(Preparing(), process, "x0"), scale),
            process,
            lambda x, t, cond: torch.zeros_like(x),
            where="x0+chain",
        ),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.bool),
    )
    levels = process.levels(3)
    levels = levels[:, None].expand(4, 3) if per_row else levels
    got = sample(guided, process, levels, DDIM(), cond=COND, init=X)
    plain = ClassifierFree(lambda x, t, cond: 0.1 * x + cond["goal"].sum((1, 2))[:, None, None], scale)
    assert torch.allclose(got, sample(plain, process, levels, DDIM(), cond=COND, init=X), atol=1e-13)


def test_preparation_drops_the_conditioning_once():
    told, process = Told(), Flow()
    sample(ClassifierFree(told, 2.0), process, process.levels(4), cond=COND, init=X)
    assert len({id(cond) for _, _, cond in told.batches}) == 1


def test_guidance_needs_conditioning_it_knows():
    with pytest.raises(ValueError, match="needs conditioning"):
        ClassifierFree(Told(), 2.0)(X, 0.5)
    with pytest.raises(ValueError, match="no 'gaol' to drop; it has: obs, goal"):
        ClassifierFree(Told(), 2.0, ("gaol",))(X, 0.5, COND)


# Dropping


def test_dropping_whole_samples_of_some_keys():
    mask = torch.tensor([True, False, True])
    dropped = drop_conditioning(COND, ["goal"], mask)
    assert dropped["obs"] is COND["obs"]
    assert torch.equal(dropped["goal"][1], COND["goal"][1])
    assert float(dropped["goal"][[0, 2]].abs().sum()) == 0
    both = drop_conditioning(COND, None, mask)
    assert float(both["obs"][0].abs().sum()) == 0


def test_dropping_single_features():
    mask = {"goal": torch.tensor([[[True, False]]]).expand(3, 1, 2)}
    dropped = drop_conditioning(COND, ["goal"], mask, mode="per_element")
    assert float(dropped["goal"][..., 0].abs().sum()) == 0
    assert torch.equal(dropped["goal"][..., 1], COND["goal"][..., 1])
    with pytest.raises(ValueError, match="unknown mode 'rows'"):
        drop_conditioning(COND, ["goal"], torch.ones(3), mode="rows")


@pytest.mark.parametrize("mode", ["per_sample", "per_element"])
def test_random_dropping(mode):
    cond = {"a": torch.ones(4000, 2, 3), "b": torch.ones(4000, 1), "c": torch.ones(4000, 1)}
    dropped = random_drop(cond, 0.2, ["a", "b"], mode, torch.Generator().manual_seed(0))
    again = random_drop(cond, 0.2, ["a", "b"], mode, torch.Generator().manual_seed(0))
    assert all(torch.equal(dropped[key], again[key]) for key in cond)
    assert torch.equal(dropped["c"], cond["c"])
    gone = 1 - dropped["a"].flatten(1)
    # 4000 draws of probability 0.2: standard error 0.0063; four of them
    assert float((1 - dropped["b"]).mean()) == pytest.approx(0.2, abs=0.025)
    assert float(gone.mean()) == pytest.approx(0.2, abs=0.025)
    whole_rows = bool((gone.min(1).values == gone.max(1).values).all())
    assert whole_rows == (mode == "per_sample")
    if whole_rows:  # the keys go together
        assert torch.equal(gone[:, 0], 1 - dropped["b"][:, 0])
    assert torch.equal(random_drop(cond, 0.0)["a"], cond["a"])
    assert float(sum(value.sum() for value in random_drop(cond, 1.0).values())) == 0


# Gradient


def quadratic(target):
    return lambda x, t, cond: -0.5 * ((x - target) ** 2).flatten(1).sum(1)


@pytest.mark.parametrize("process", [VP.cosine(100), EDM(), Flow()], ids=repr)
def test_shift_is_sigma_squared_over_alpha_times_the_gradient(process):
    t = float(process.levels(5)[2])
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    halve = lambda x, t, cond=None: 0.5 * x  # noqa: E731
    # gradient of -(z - 3)^2/2 is 3 - z, at z = x, at z = x/2, and there times the denoiser's slope of 1/2
    for where, push in (("x_t", 3 - X), ("x0", 3 - 0.5 * X), ("x0+chain", 0.5 * (3 - 0.5 * X))):
        guided = GradientGuidance(halve, process, gradient_of(quadratic(3.0)), where=where, scale=0.7)
        wanted = 0.5 * X + 0.7 * sigma**2 / alpha * push
        assert torch.allclose(guided(X, t), wanted, rtol=1e-12)
        rows = torch.full((3,), t, dtype=F64)
        assert torch.allclose(guided(X, rows), wanted, rtol=1e-12)
        assert torch.allclose(guided(X, rows[:, None].expand(3, 5)), wanted, rtol=1e-12)


def test_mask_scale_schedule_and_normalisation():
    process, t = EDM(), 2.0
    mask = torch.tensor([1.0, 0.0], dtype=F64)
    nothing = lambda x, t, cond=None: torch.zeros_like(x)  # noqa: E731
    push = lambda x, t, cond: torch.full_like(x, 3.0)  # noqa: E731
    masked = GradientGuidance(nothing, process, push, mask=mask)(X, t)
    assert torch.allclose(masked, 12.0 * mask.expand_as(X))
    scheduled = GradientGuidance(nothing, process, push, scale=lambda level: 1 / (1 + level))(X, t)
    assert torch.allclose(scheduled, torch.full_like(X, 4.0))
    normal = GradientGuidance(nothing, process, push, mask=mask, normalize=True)(X, t)
    assert torch.allclose(normal.flatten(1).norm(dim=1), torch.full((3,), 4.0, dtype=F64))
    assert float(normal[..., 1].abs().max()) == 0
    still = GradientGuidance(nothing, process, lambda x, t, cond: torch.zeros_like(x), normalize=True)(X, t)
    assert torch.equal(still, torch.zeros_like(X))  # 0 / 0 is no push, not NaN


def test_schedule_by_step():
    levels = EDM().levels(4)
    scale = by_step(levels, lambda k, n: (n - k) / n)
    assert [scale(t) for t in levels.tolist()] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert scale(1.2345) == 0.0
    seen = []
    guided = GradientGuidance(
        lambda x, t, cond=None: 0 * x, EDM(), lambda x, t, cond: seen.append(scale(t)) or x, scale=scale
    )
    sample(guided, EDM(), levels, DDIM(), init=X)
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_scale_zero_is_unguided_bit_for_bit():
    process = EDM()
    denoiser = GaussianDenoiser([0.3, 0.1], 0.5, process)
    guided = GradientGuidance(denoiser, process, gradient_of(quadratic(3.0)), where="x0+chain", scale=0.0)
    runs = [
        sample(d, process, process.levels(5), DDPM(), shape=(4, 2), generator=torch.Generator().manual_seed(0))
        for d in (guided, denoiser)
    ]
    assert torch.equal(*runs)


def test_stronger_guidance_goes_further_and_narrows():
    process = EDM(0.002, 10.0)
    denoiser = GaussianDenoiser([0.0], 1.0, process)
    means, stds = [], []
    for scale in (0.0, 0.5, 1.0, 2.0):
        guided = GradientGuidance(denoiser, process, gradient_of(quadratic(1.5)), where="x0+chain", scale=scale)
        x = sample(
            guided, process, process.levels(20), Heun(), init=10 * torch.linspace(-2, 2, 101, dtype=F64)[:, None]
        )
        means.append(float(x.mean()))
        stds.append(float(x.std()))
    assert means == sorted(means)
    assert stds == sorted(stds, reverse=True)


def test_no_push_without_signal():
    guided = GradientGuidance(lambda x, t, cond=None: x, Flow(), lambda x, t, cond: torch.ones_like(x))
    assert torch.equal(guided(X, 1.0), X)
    assert bool((guided(X, 0.9) > X).all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["x_t", "x0", "x0+chain"])
def test_guidance_works_where_gradients_are_off(mode, where):
    process = Flow()
    network = torch.nn.Linear(2, 2).double()
    denoiser = NetworkDenoiser(lambda x, t, cond: network(x) + network(cond["goal"]), process, "velocity")
    guided = GradientGuidance(denoiser, process, gradient_of(quadratic(1.0)), where=where, scale=0.1)
    outside = guided(X, 0.5, COND).detach()
    with mode():
        cond = {key: value.clone() for key, value in COND.items()}  # made here: an inference tensor in inference mode
        inside = guided(X.clone(), 0.5, cond)
        end = sample(guided, process, process.levels(3), Heun(), cond=cond, shape=(3, 5, 2), like=X)
    assert torch.equal(inside, outside)
    assert not end.requires_grad
    assert network.weight.grad is None


def test_rows_are_pushed_each_by_its_own_gradient():
    process = EDM()
    denoiser = GaussianDenoiser(torch.zeros(10), 1.0, process)
    guided = GradientGuidance(denoiser, process, gradient_of(quadratic(1.0)), where="x0+chain", normalize=True)
    together = guided(X, 0.8)
    for i in range(3):
        assert torch.allclose(guided(X[i : i + 1], 0.8), together[i : i + 1], atol=1e-14)


def test_parts_are_pushed_through_what_they_share():
    processes = {"action": Flow(), "image": EDM()}

    def denoiser(x, t, cond):
        return {"action": 0.5 * x["action"] + x["image"].mean(1, keepdim=True), "image": 0.25 * x["image"]}

    x = {"action": torch.ones(2, 3, dtype=F64), "image": torch.ones(2, 4, dtype=F64)}
    t = {"action": 0.5, "image": 2.0}

    def push(x, t, cond):
        return {"action": 2 * torch.ones_like(x["action"])}

    plain = GradientGuidance(denoiser, processes, push, where="x0")(x, t)
    assert torch.allclose(plain["action"], torch.full((2, 3), 1.5 + 0.5 * 2.0, dtype=F64))
    assert torch.equal(plain["image"], 0.25 * x["image"])
    chain = GradientGuidance(denoiser, processes, push, where="x0+chain", mask={"action": 1.0, "image": 0.5})(x, t)
    assert torch.allclose(chain["action"], torch.full((2, 3), 1.5 + 0.5 * 1.0, dtype=F64))
    # 2 from each of three actions, spread over four pixels; sigma^2/alpha = 4; half of it by the mask
    assert torch.allclose(chain["image"], torch.full((2, 4), 0.25 + 4 * 0.5 * 3 * 2 / 4, dtype=F64))
    gradient = gradient_of(lambda x, t, cond: x["action"].sum(1))(x, t, None)
    assert torch.equal(gradient["action"], torch.ones(2, 3, dtype=F64))
    assert torch.equal(gradient["image"], torch.zeros(2, 4, dtype=F64))


def test_unknown_place():
    with pytest.raises(ValueError, match="unknown where 'x1'"):
        GradientGuidance(Told(), Flow(), quadratic(1.0), where="x1")


# Inpainting

SAMPLERS = [DDPM(), DDIM(), DDIM(eta=0.7), CPS(), ConsistencyRenoise(), Heun(), DPMSolverPP2M(), DPMSolverPP2S()]
KNOWN, MASK = normal(3, 5, 2), normal(3, 5, 2) < -0.3


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("process", [VP.cosine(50), EDM(), Flow()], ids=repr)
def test_known_entries_are_held_by_every_sampler(process, sampler):
    denoiser = GaussianDenoiser(torch.zeros(10), 0.5, process)
    x = sample(
        Inpaint(denoiser, KNOWN, MASK),
        process,
        process.levels(6),
        sampler,
        shape=(3, 5, 2),
        like=KNOWN,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.allclose(x[MASK], KNOWN[MASK], atol=1e-12)
    assert not torch.allclose(x[~MASK], KNOWN[~MASK], atol=0.1)


def test_clip_does_not_touch_what_is_known_inside_the_bound():
    process, known = VP.cosine(50), torch.full((1, 2), 0.9)
    x = sample(
        Inpaint(lambda x, t, cond=None: 3 * x, known, torch.tensor([True, False])),
        process,
        process.levels(5),
        DDIM(clip=1.0),
        shape=(1, 2),
        generator=torch.Generator().manual_seed(0),
    )
    assert float(x[0, 0]) == pytest.approx(0.9, abs=1e-6)


def test_inpainting_conditions_the_rest():
    # a strongly correlated pair: knowing one entry moves the other
    process = EDM(0.002, 20.0)
    denoiser = GaussianDenoiser([0.0, 0.0], [[1.0, 0.95], [0.95, 1.0]], process)
    known, mask = torch.tensor([1.5, 0.0]), torch.tensor([True, False])
    x = sample(
        Inpaint(denoiser, known, mask),
        process,
        process.levels(40),
        DDPM(),
        shape=(4000, 2),
        generator=torch.Generator().manual_seed(0),
    )
    assert float(x[:, 1].mean()) > 0.8  # unconditional mean 0, conditional mean 1.425


@pytest.mark.parametrize("process", [VP.cosine(50), EDM(), Flow()], ids=repr)
def test_holding_the_sample_itself(process):
    seen = []
    denoiser = GaussianDenoiser(torch.zeros(10), 0.5, process)
    common = {"shape": (3, 5, 2), "like": KNOWN, "callback": seen.append}
    clean = sample(denoiser, process, process.levels(4), DDPM(), project=hold(KNOWN, MASK), **common)
    assert all(torch.equal(step.x[MASK], KNOWN[MASK]) for step in seen)
    assert torch.equal(clean[MASK], KNOWN[MASK])
    seen.clear()
    noise = torch.randn(3, 5, 2, dtype=F64)
    project = hold(KNOWN, MASK, process, noise)
    noisy = sample(denoiser, process, process.levels(4), DDPM(), project=project, **common)
    for step in seen:
        wanted = process.alpha(step.t) * KNOWN + process.sigma(step.t) * noise
        assert torch.allclose(step.x[MASK], wanted[MASK], atol=1e-12)
    assert torch.equal(noisy[MASK], KNOWN[MASK])


def test_holding_parts_at_their_own_levels():
    known, mask = {"a": torch.ones(2, 3)}, {"a": torch.tensor([True, False, False])}
    x = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2)}
    held = Inpaint(lambda x, t, cond=None: x, known, mask)(x, 0.5)
    assert held["a"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert held["b"] is x["b"]
    project = hold(known, mask, {"a": EDM()}, {"a": torch.full((2, 3), 0.5)})
    projected = project(x, {"a": torch.tensor([2.0, 4.0]), "b": 1.0})
    assert projected["a"][:, 0].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="both a process and noise"):
        hold(known, mask, EDM())


def test_wrappers_nest():
    process = EDM(0.01, 5.0)
    conditional, unconditional = GaussianDenoiser([1.0, 1.0], 0.3, process), GaussianDenoiser([0.0, 0.0], 1.0, process)

    def told(x, t, cond):
        return torch.where(cond["goal"].flatten(1)[:, :1] != 0, conditional(x, t), unconditional(x, t))

    nested = Inpaint(
        GradientGuidance(ClassifierFree(told, 1.5), process, gradient_of(quadratic(2.0)), where="x0+chain", scale=0.2),
        torch.tensor([0.7, 0.0]),
        torch.tensor([True, False]),
    )
    x, cond, t = torch.randn(4, 2, dtype=F64), {"goal": torch.ones(4, 1, dtype=F64)}, 0.8

    def base(x):
        return unconditional(x, t) + 1.5 * (conditional(x, t) - unconditional(x, t))

    start = x.clone().requires_grad_()
    (push,) = torch.autograd.grad(quadratic(2.0)(base(start), t, None).sum(), start)
    wanted = base(x) + 0.2 * t**2 * push
    wanted[:, 0] = 0.7
    assert torch.allclose(nested(x, t, cond), wanted, atol=1e-7)  # 0.7 was given in float32
