import pytest
import torch

from dipole.diffusion import (
    CPS,
    DDIM,
    DDPM,
    EDM,
    VP,
    ConsistencyRenoise,
    ContinuousVP,
    DPMSolverPP2M,
    Flow,
    FlowSDE,
    GaussianDenoiser,
    Heun,
    MixtureDenoiser,
    NetworkDenoiser,
    add_noise,
    sample,
    sample_chain,
    score_chain,
)

F64 = torch.float64
PROCESSES = [VP.cosine(20), ContinuousVP(), EDM(), Flow()]
KERNELS = [DDPM(clip=1.0), DDIM(), DDIM(eta=0.8, clip=1.0), CPS(), ConsistencyRenoise()]
T, D = 4, 3


def elementwise(x, t, cond=None):
    """A denoiser without sums or transcendental functions, whose result for an entry depends on that entry alone."""
    level = torch.as_tensor(t, dtype=x.dtype)
    level = level.reshape(level.shape + (1,) * (x.dim() - level.dim()))
    return x.clamp(-2, 2) * 0.4 + 0.1 / (2.5 + level)


def generators(count, seed=100):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def mixed(process, count):
    """Levels of `count` rows that start and stop at different times, `[6, count]`."""
    base = process.levels(5)
    rows = [
        base,
        base[[1, 1, 2, 3, 4, 5]],
        base[[2, 2, 2, 3, 4, 5]],
        base[[0, 1, 5, 5, 5, 5]],
        base[[3, 3, 3, 3, 3, 3]],
    ]
    return torch.stack([rows[i % 5] for i in range(count)], dim=1)


@pytest.mark.parametrize("kernel", [*KERNELS, Heun(), DPMSolverPP2M()], ids=repr)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_same_seed_same_result(process, kernel):
    runs = [
        sample(
            elementwise,
            process,
            process.levels(5),
            kernel,
            shape=(6, T, D),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("per_row_levels", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_row_does_not_depend_on_how_the_batch_is_split(process, kernel, per_row_levels, dtype):
    levels = mixed(process, 7) if per_row_levels else process.levels(5)

    def run(rows):
        chosen = levels[:, rows] if per_row_levels else levels
        own = generators(7)
        return sample(
            elementwise,
            process,
            chosen,
            kernel,
            shape=(len(rows), T, D),
            generator=[own[i] for i in rows],
            like=torch.empty(0, dtype=dtype),
        )

    whole = run(range(7))
    assert whole.dtype == dtype
    for split in ([[0, 1, 2], [3, 4, 5, 6]], [[i] for i in range(7)], [[6, 0], [3, 1], [5, 2, 4]]):
        for rows in split:
            assert torch.equal(run(rows), whole[rows])


def test_churn_does_not_depend_on_the_split_either():
    process, solver = EDM(), Heun(churn=10.0, num_steps=5)

    def run(rows):
        own = generators(4)
        shape = (len(rows), T, D)
        return sample(elementwise, process, process.levels(5), solver, shape=shape, generator=[own[i] for i in rows])

    whole = run(range(4))
    for rows in ([0], [1, 2], [3]):
        assert torch.equal(run(rows), whole[rows])


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_per_row_and_per_position_levels_equal_shared_ones_where_they_are_equal(process, kernel):
    levels = process.levels(5)
    init = torch.randn(3, T, D, generator=torch.Generator().manual_seed(0))

    def run(chosen):
        return sample(elementwise, process, chosen, kernel, init=init, generator=torch.Generator().manual_seed(1))

    # the network is told float64 levels as tensors and as numbers: bit for bit the same
    shared = run(levels)
    assert torch.equal(run(levels[:, None].expand(6, 3)), shared)
    assert torch.equal(run(levels[:, None, None].expand(6, 3, T)), shared)
    assert torch.equal(run(levels[:, None, None].expand(6, 1, T)), shared)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_positions_pinned_at_a_level_stay(process):
    base = process.levels(5)
    levels = base[:, None, None].repeat(1, 2, T)
    levels[:, :, 0] = process.clean
    levels[:, 1, 2] = base[2]
    init = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
    x = sample(elementwise, process, levels, DDPM(), init=init, generator=generators(2))
    assert torch.equal(x[:, 0], init[:, 0])
    assert torch.equal(x[1, 2], init[1, 2])
    assert not torch.equal(x[0, 2], init[0, 2])


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_parts_are_sampled_each_at_its_own_level(kernel):
    processes = {"action": Flow(), "image": VP.cosine(20)}
    levels = {"action": Flow().levels(4), "image": torch.full((5,), -1.0)}
    clean = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    action = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    told = []

    def denoiser(x, t, cond):
        told.append(dict(t))
        assert torch.equal(x["image"], clean)
        return {"action": elementwise(x["action"], t["action"]), "image": torch.zeros_like(x["image"])}

    x = sample(
        denoiser,
        processes,
        levels,
        kernel,
        init={"action": action, "image": clean},
        generator=torch.Generator().manual_seed(2),
    )
    alone = sample(
        elementwise, Flow(), levels["action"], kernel, init=action, generator=torch.Generator().manual_seed(2)
    )
    assert torch.equal(x["image"], clean)
    assert torch.equal(x["action"], alone)
    assert [t["action"] for t in told] == [1.0, 0.75, 0.5, 0.25]


def test_parts_may_share_levels_and_process_and_start_from_noise():
    shape, process = {"a": (3, T, D), "b": (3, 2)}, EDM(0.01, 7.0)
    generator = torch.Generator().manual_seed(0)
    seen = []

    def denoiser(x, t, cond):
        seen.append((x, t))
        return x

    x = sample(denoiser, process, process.levels(3), shape=shape, generator=generator)
    assert {key: part.shape for key, part in x.items()} == {"a": (3, T, D), "b": (3, 2)}
    again = torch.Generator().manual_seed(0)
    first = {key: 7.0 * torch.randn(size, generator=again) for key, size in shape.items()}
    assert all(torch.allclose(seen[0][0][key], first[key], rtol=1e-6) for key in shape)
    assert seen[0][1] == pytest.approx(7.0)


def test_levels_per_row_with_parts():
    process = Flow()
    rows = torch.tensor([[1.0, 0.5], [0.5, 0.5], [0.0, 0.0]])
    init = {"a": torch.randn(2, 3, dtype=F64), "b": torch.randn(2, T, D, dtype=F64)}
    levels = {"a": rows, "b": rows}
    x = sample(lambda x, t, cond: {key: elementwise(x[key], t[key]) for key in x}, process, levels, init=init)
    for key in init:
        for i in range(2):
            alone = sample(elementwise, process, rows[:, i].unique().flip(0), init=init[key][i : i + 1])
            assert torch.equal(x[key][i : i + 1], alone)


def test_initial_noise_has_the_prior_s_size_in_every_process():
    zero = lambda x, t, cond: torch.zeros_like(x)  # noqa: E731
    for process, std in ((VP.cosine(20), 1.0), (Flow(), 1.0), (EDM(0.01, 30.0), 30.0)):
        starts = []
        sample(
            zero,
            process,
            process.levels(2),
            shape=(4000,),
            generator=torch.Generator().manual_seed(0),
            callback=lambda info: starts.append(info.x),  # noqa: B023
        )
        # 4000 draws: the standard error of the std is 1.1 %; four of them
        assert float(starts[0].std()) == pytest.approx(std, rel=0.045)


def test_one_generator_per_row_is_what_a_generator_alone_draws():
    x = sample(elementwise, Flow(), Flow().levels(1), shape=(2, 3), generator=generators(2))
    start = torch.stack([torch.randn(3, generator=g) for g in generators(2)])
    assert torch.equal(x, elementwise(start, 1.0))
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        sample(elementwise, Flow(), Flow().levels(1), shape=(2, 3), generator=generators(3))


def test_starting_below_the_first_level_visits_the_rest():
    process, x0 = VP.cosine(20), torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(x0, torch.ones(2, T, D), 9.0, process)
    seen = []
    short = sample(
        elementwise, process, process.levels(5), init=noisy, t_start=9.0, callback=lambda i: seen.append(i.t)
    )
    assert seen == [9.0, 7.0, 3.0]
    assert torch.equal(short, sample(elementwise, process, torch.tensor([9.0, 7.0, 3.0, -1.0]), init=noisy))
    assert sample(elementwise, process, process.levels(5), init=noisy, t_start=-1.0) is noisy


def test_levels_may_be_whole_numbers():
    process, init = VP.cosine(20), torch.randn(2, T, D)
    whole = sample(elementwise, process, torch.tensor([9, 7, 3, -1]), init=init)
    assert torch.equal(whole, sample(elementwise, process, torch.tensor([9.0, 7.0, 3.0, -1.0]), init=init))


def test_callback_sees_every_step_and_project_every_sample():
    process, held = Flow(), []
    steps = []

    def project(x, t):
        held.append(t)
        return x.clone().index_fill_(1, torch.tensor([0]), 5.0)

    x = sample(elementwise, process, process.levels(3), init=torch.zeros(1, 2), project=project, callback=steps.append)
    assert held == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    assert [s.index for s in steps] == [0, 1, 2]
    assert all(float(s.x[0, 0]) == 5.0 and float(s.x_next[0, 0]) == 5.0 for s in steps)
    assert torch.equal(steps[-1].x_next, x)
    assert steps[1].x is steps[0].x_next


def test_ddim_inversion_finds_the_noise_again():
    process = ContinuousVP()
    denoiser = MixtureDenoiser([0.5, 0.5], [[-0.5], [0.5]], 0.3, process)
    noise = torch.linspace(-2, 2, 7, dtype=F64).reshape(7, 1)
    levels = torch.linspace(0.999, 0.001, 400, dtype=F64)
    data = sample(denoiser, process, levels, DDIM(), init=noise)
    # two first-order integrations of 400 steps of 1/400
    assert torch.allclose(sample(denoiser, process, levels.flip(0), DDIM(), init=data), noise, atol=0.03)


def chain_of(kernel, process, levels, denoiser, **options):
    return sample_chain(denoiser, process, levels, kernel, generator=torch.Generator().manual_seed(3), **options)


@pytest.mark.parametrize("kernel", [DDPM(), DDPM(clip=1.0), DDIM(eta=0.5, clip=1.0), CPS(), FlowSDE()], ids=repr)
@pytest.mark.parametrize("per_row", [False, True])
def test_ratio_is_one_before_the_first_update_and_gradient_flows(kernel, per_row):
    process = Flow()
    network = torch.nn.Linear(D, D).double()
    denoiser = NetworkDenoiser(lambda x, t, cond: network(x) + cond, process, "velocity")
    cond, levels = torch.randn(5, 1, D, dtype=F64), process.levels(4)
    if per_row:
        levels = levels[:, None].expand(5, 5)
    with torch.inference_mode():
        chain = chain_of(kernel, process, levels, denoiser, shape=(5, T, D), like=cond, cond=cond.clone())
    samples = tuple(x.clone() for x in chain.samples)  # ordinary tensors again
    chain = type(chain)(chain.levels, samples, chain.x0_hats)
    last = isinstance(kernel, FlowSDE)  # the others end deterministically
    steps = range(4 if last else 3)
    old = score_chain(denoiser, process, kernel, chain, cond, reduce="sum", steps=steps).detach()
    new = score_chain(denoiser, process, kernel, chain, cond, reduce="sum", steps=steps)
    assert new.shape == (len(steps), 5)
    # what the sampler drew is scored by the mean it was drawn around: z-scores are the noise itself
    assert torch.equal(torch.exp(new.detach() - old), torch.ones_like(old))
    new.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in network.parameters())
    if not last:
        with pytest.raises(ValueError, match="deterministic"):
            score_chain(denoiser, process, kernel, chain, cond, reduce="sum")


@pytest.mark.parametrize("kernel", [DDPM(clip=1.0), DDIM(eta=0.5), CPS(), FlowSDE()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_scorer_s_mean_is_the_sampler_s_bit_for_bit(kernel, dtype):
    process = Flow()
    chain = chain_of(kernel, process, process.levels(4), elementwise, shape=(5, T, D), like=torch.empty(0, dtype=dtype))
    again, noises = torch.Generator().manual_seed(3), []
    for _ in range(5):
        noises.append(torch.empty(5, T, D, dtype=dtype).normal_(generator=again))
    levels = process.levels(4).tolist()
    for k in range(3):
        x = chain.samples[k]
        for t, s in (
            (levels[k], levels[k + 1]),
            (torch.full((5,), levels[k]).double(), torch.full((5,), levels[k + 1]).double()),
        ):
            dist = kernel.step(x, elementwise(x, t), t, s, process)
            assert torch.equal(dist.sample(noise=noises[k + 1]), chain.samples[k + 1])


def test_score_leaves_out_what_does_not_move():
    process, kernel = Flow(), DDPM()
    levels = {"a": process.levels(3), "b": torch.zeros(4)}

    def denoiser(x, t, cond):
        return {key: 0.5 * part for key, part in x.items()}

    init = {"a": torch.randn(2, 3, dtype=F64), "b": torch.randn(2, 4, dtype=F64)}
    chain = chain_of(kernel, process, levels, denoiser, init=init)
    score = score_chain(denoiser, process, kernel, chain, reduce="sum", steps=range(2))
    alone = chain_of(kernel, process, levels["a"], lambda x, t, cond: 0.5 * x, init=init["a"])
    wanted = score_chain(lambda x, t, cond: 0.5 * x, process, kernel, alone, reduce="sum", steps=range(2))
    assert torch.equal(score, wanted)
    # finished and waiting positions
    positions = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.5, 0.0]]).unsqueeze(1)
    x = torch.randn(2, 3, 2, dtype=F64)
    chain = chain_of(kernel, process, positions, lambda x, t, cond: 0.5 * x, init=x)
    score = score_chain(lambda x, t, cond: 0.5 * x, process, kernel, chain, reduce="sum")
    moved = kernel.step(x[:, :1], 0.5 * x[:, :1], 1.0, 0.5, process).log_prob(chain.samples[1][:, :1], "sum")
    assert torch.allclose(score, moved[None], atol=1e-12)
    half = torch.tensor([[[True, False]]])
    masked = score_chain(lambda x, t, cond: 0.5 * x, process, kernel, chain, reduce="sum", mask=half)
    assert not torch.allclose(masked, score)
    assert torch.equal(
        masked, score_chain(lambda x, t, cond: 0.5 * x, process, kernel, chain, reduce="sum", mask=half.expand(2, 3, 2))
    )


def test_chain_records_what_was_visited():
    chain = chain_of(DDPM(), Flow(), Flow().levels(4), elementwise, init=torch.randn(2, 3), t_start=0.5)
    assert chain.levels.tolist() == [0.5, 0.25, 0.0]
    assert len(chain.samples) == 3
    assert len(chain.x0_hats) == 2
    assert chain.final is chain.samples[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": Flow().levels(2)}, "needs the shape"),
        ({"levels": torch.tensor([0.0, 1.0]), "kernel": DDPM(), "shape": (1, 2)}, "levels must not increase"),
        ({"levels": torch.tensor([[0.0], [1.0]]), "kernel": DDIM(eta=0.5), "shape": (1, 2)}, "must not increase"),
        ({"levels": torch.tensor([0.0, 1.0]), "shape": (1, 2)}, "divide by 0"),
        ({"levels": {"a": torch.ones(3), "b": torch.ones(2)}, "shape": {"a": (1, 2), "b": (1, 2)}}, "same number"),
        ({"levels": {"a": torch.ones(3)}, "shape": {"a": (1, 2)}, "t_start": 0.5}, "t_start needs one level list"),
        ({"levels": torch.ones(3, 1), "shape": (1, 2), "t_start": 0.5}, "t_start needs one level list"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample(elementwise, Flow(), **options)


def test_remembered_coefficients_do_not_mix_up_processes_and_kernels():
    def runs():
        return [
            sample(elementwise, p, torch.tensor([0.9, 0.5]), k, init=torch.ones(1, 2), generator=generators(1))
            for p in (Flow(), EDM())
            for k in (DDIM(eta=1.0), DDIM(eta=1.0, clip=0.1))
        ]

    first, again = runs(), runs()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(a[0, 0]) for a in first}) == 4


def test_sampling_in_inference_mode_leaves_nothing_that_breaks_training():
    process = VP.cosine(7)  # a process of its own, so that its constants are first made in inference mode
    network = torch.nn.Linear(D, D)
    told = torch.nn.Linear(1, D)
    denoiser = NetworkDenoiser(lambda x, t, cond: network(x) + told(t[:, None])[:, None], process)
    with torch.inference_mode():
        sample(denoiser, process, process.levels(3), shape=(2, T, D))
    x = sample(denoiser, process, process.levels(3), shape=(2, T, D), generator=torch.Generator().manual_seed(0))
    x.sum().backward()
    assert float(network.weight.grad.abs().sum()) > 0
    assert float(told.weight.grad.abs().sum()) > 0


def test_gaussian_data_is_recovered():
    process = Flow()
    denoiser = GaussianDenoiser([0.3, -0.2], [[0.2, 0.1], [0.1, 0.4]], process)
    x = sample(
        denoiser, process, process.levels(100), Heun(), shape=(20000, 2), generator=torch.Generator().manual_seed(0)
    )
    # standard errors of 20 000 samples: 0.0045 for means, 0.004 for variances; four of them
    assert torch.allclose(x.mean(0), torch.tensor([0.3, -0.2]), atol=0.018)
    assert torch.allclose(torch.cov(x.T), torch.tensor([[0.2, 0.1], [0.1, 0.4]]), atol=0.016)
