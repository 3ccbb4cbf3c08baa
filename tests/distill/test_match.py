"""Match: zero at the true map and nowhere near it, for every member of the family; students that learn the map."""

from itertools import pairwise

import pytest
import torch
from analytic import EDM, FLOW, MIXTURE, PROCESSES, VP, Gaussian, Mixture, Scaled, column, consistent, shifted

from fewstep.distill.distances import DISTANCES, PseudoHuber
from fewstep.distill.jumps import CMBoundary, Landing, LCMBoundary
from fewstep.distill.predict import Prediction
from fewstep.distill.solvers import SOLVERS
from fewstep.distill.spans import GridSpans, Span, TrajectorySpans, even_points, karras_points, segment_edges
from fewstep.distill.terms import Match, inverse_gap
from fewstep.samplers import InputError

any_process = pytest.mark.parametrize("name", PROCESSES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def states(teacher, t, seed=0):
    """Draws of x_t, (B, 3)."""
    x0 = teacher.draw(len(t), 3, seed=seed)
    noise = torch.randn(x0.shape, generator=generator(seed + 1), dtype=torch.float64)
    return teacher.process.add_noise(x0, noise, t)


def points_of(process, steps):
    return karras_points(process, steps + 1) if process is EDM else even_points(process, steps)


def ends_of(points, edges, *, forward=False):
    """The end of the segment of each time on a grid, as `GridSpans` has it."""
    bounds = torch.tensor([points[edge] for edge in (*edges, len(points) - 1)], dtype=torch.float64)

    def end(t):
        index = torch.searchsorted(bounds, t, right=forward)
        return bounds[(index if forward else index - 1).clamp(0, len(bounds) - 1)]

    return end


@any_process
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("forward", [False, True], ids=["reverse", "forward"])
def test_the_true_map_is_a_zero(name, segments, forward):
    """With x_r on the true path the loss of the true student is rounding; of a wrong one it is what it is off.

    CD, LCM (one segment), PCM, TSCD (several), and iCD's forward student.
    """
    teacher = Mixture(PROCESSES[name], *MIXTURE)
    points, edges = points_of(teacher.process, 10), segment_edges(10, segments)
    if forward:  # a network is not asked at clean data
        points = points[1:]
        edges = segment_edges(9, segments)
    span = GridSpans(points, edges, forward=forward)(teacher.process, 60, generator())
    student = consistent(teacher.process, teacher.map, ends_of(points, edges, forward=forward))
    x_t = states(teacher, span.t)
    x_r = teacher.map(x_t, span.t, span.r)
    match = Match(teacher.process)
    assert match(student, student, x_t, x_r, span).max() < 1e-16
    wrong = shifted(student, teacher.process, 0.1)
    assert match(wrong, student, x_t, x_r, span).min() > 0

    def drifting(x, t, s):
        return teacher.map(x, t, s) * (1 + teacher.process.sigma(t)[:, None] / 100)

    unsteady = consistent(teacher.process, drifting, ends_of(points, edges, forward=forward))
    assert match(unsteady, unsteady, x_t, x_r, span).max() > 1e-10


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpm2", 2)])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_with_a_solver_the_true_map_is_a_zero_to_its_order(solver, order, name):
    """One step of width h errs by h^(order + 1), and the mean square by its square."""
    teacher = Mixture(PROCESSES[name], *MIXTURE)
    student = consistent(teacher.process, teacher.map, lambda t: torch.full_like(t, 200.0))
    t = torch.full((8,), 600.0, dtype=torch.float64)
    x_t = states(teacher, t)
    losses = []
    for width in (20.0, 10.0, 5.0):
        span = Span(t, t - width, torch.full_like(t, 200.0))
        x_r = SOLVERS[solver]()(teacher.process, teacher, x_t, span.t, span.r)
        losses.append(float(Match(teacher.process)(student, student, x_t, x_r, span).mean()))
    for coarse, fine in pairwise(losses):
        assert coarse / fine == pytest.approx(4 ** (order + 1), rel=0.25)


def test_without_a_teacher_the_mean_of_the_goal_is_right():
    """CT: x_r of the same data and noise. Where r is clean the loss is denoising: its minimiser is E[x0 | x_t]."""
    teacher = Gaussian(FLOW)
    t = torch.full((4000,), 500.0, dtype=torch.float64)
    span = Span(t, torch.zeros_like(t), torch.zeros_like(t))
    x0 = teacher.draw(4000, 1)
    x_t = FLOW.add_noise(x0, torch.randn(x0.shape, generator=generator(), dtype=torch.float64), t)

    def never(x, t):
        assert (t > 0).all()
        return teacher(x, t)

    best = Match(FLOW)(teacher, never, x_t, x0, span).mean()
    for by in (-0.1, 0.1):
        assert Match(FLOW)(shifted(teacher, FLOW, by), never, x_t, x0, span).mean() > best


def test_tcd_is_zero_for_data_at_one_point():
    """A prediction that is not told s can be right for every s only where the path is straight."""
    point = 0.5

    def student(x, t):
        x0 = torch.full_like(x, point)
        return Prediction(x0, (x - column(VP.alpha(t), x) * x0) / column(VP.sigma(t), x))

    span = TrajectorySpans(even_points(VP, 10))(VP, 50, generator())
    assert span.s.unique().numel() > 3
    x_t = torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    x_r = SOLVERS["ddim"]()(VP, student, x_t, span.t, span.r)
    assert Match(VP)(student, student, x_t, x_r, span).max() < 1e-20


@pytest.mark.parametrize(("process", "jump", "low"), [(VP, LCMBoundary(), 0.0), (EDM, CMBoundary(), None)])
def test_soft_boundaries_give_what_the_hard_one_gives(process, jump, low):
    """Where r is the cleanest time, c_skip = 1 and the goal is x_r."""
    points = points_of(process, 4)
    t, r = torch.tensor([points[1]], dtype=torch.float64), torch.tensor([points[0]], dtype=torch.float64)
    teacher = Gaussian(process)
    x = torch.tensor([[0.3, 1.0]], dtype=torch.float64)
    assert low is None or float(r) == low
    landed = jump(process, x, r, r, teacher(x, r))
    torch.testing.assert_close(landed, Match(process, jump).goal(teacher, x, Span(t, r, r)), rtol=1e-6, atol=1e-9)


def test_gradient_reaches_the_student_alone():
    teacher = Gaussian(VP)
    student, target = Scaled(teacher), Scaled(teacher)
    span = GridSpans(even_points(VP, 4))(VP, 6, generator())
    x_t, x_r = states(teacher, span.t), states(teacher, span.r)
    loss = Match(VP, weight=inverse_gap)(student, target, x_t, x_r, span)
    assert loss.shape == (6,)
    loss.sum().backward()
    assert student.weight.grad.abs() > 0
    assert target.weight.grad is None


def test_weight_and_losses_in_half_precision():
    teacher = Gaussian(EDM)
    span = Span(*(torch.tensor([value], dtype=torch.float64) for value in (0.1, 0.05, 0.0)))
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    plain = Match(EDM, distance=PseudoHuber())(teacher, teacher, x, x, span)
    weighted = Match(EDM, distance=PseudoHuber(), weight=inverse_gap)(teacher, teacher, x, x, span)
    assert plain.dtype == torch.float32
    gap = torch.tensor(0.4).exp() - torch.tensor(0.2).exp()
    torch.testing.assert_close(weighted, plain / gap)


@pytest.mark.parametrize("distance", DISTANCES.names())
def test_preserve_is_zero_at_the_inverse(distance):
    """iCD: the forward student takes back what the reverse student did, and the other way round."""
    teacher = Mixture(VP, *MIXTURE)
    low, high = torch.full((5,), 259.0), torch.full((5,), 519.0)
    up, down = (consistent(VP, teacher.map, lambda t, end=end: end) for end in (high, low))
    x_high = states(teacher, high)
    with torch.no_grad():
        x_low = Landing()(VP, x_high, high, low, down(x_high, high))
    match = Match(VP, distance=DISTANCES[distance]())
    assert match.preserve(up, x_low, low, high, x_high).max() < 1e-9
    assert match.preserve(shifted(up, VP, 0.1), x_low, low, high, x_high).min() > 1e-6


class Affine(torch.nn.Module):
    """A student whose x0 is affine in x, with numbers of its own at each point of a grid."""

    def __init__(self, process, points):
        super().__init__()
        self.process = process
        self.register_buffer("points", torch.tensor(points, dtype=torch.float64))
        self.factor = torch.nn.Parameter(torch.zeros(len(points), dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.zeros(len(points), dtype=torch.float64))

    def forward(self, x, t):
        index = torch.searchsorted(self.points, t.contiguous())
        x0 = column(self.factor[index], x) * x + column(self.offset[index], x)
        return Prediction(x0, (x - column(self.process.alpha(t), x) * x0) / column(self.process.sigma(t), x))


RUNS = {
    "cd": (VP, "heun", (0,), False),
    "lcm flow": (FLOW, "ddim", (0,), False),
    "pcm": (VP, "ddim", (0, 3), False),
    "icd forward": (FLOW, "ddim", (0, 3), True),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_student_learns_the_one_step_map(run):
    """300 steps of Adam: the jump of each segment is what the teacher's own steps do, which is near the true map."""
    process, solver, edges, forward = RUNS[run]
    teacher = Gaussian(process)
    points = even_points(process, 6)
    if points[0] == process.clean_time:
        points = (20.0, *points[1:])
    span = GridSpans(points, edges, forward=forward)(process, 256, generator())
    student, match, solve = Affine(process, points), Match(process), SOLVERS[solver]()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    x_t = states(teacher, span.t)
    x_r = solve(process, teacher, x_t, span.t, span.r)
    for _ in range(300):
        loss = match(student, student, x_t, x_r, span).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    bounds = [points[edge] for edge in edges] + [points[-1]]
    for low, high in pairwise(bounds):
        way = [point for point in points if low <= point <= high][:: 1 if forward else -1]
        times = torch.tensor(way, dtype=torch.float64)[:, None].expand(-1, 5)
        x = states(teacher, times[0])
        landed = Landing()(process, x, times[0], times[-1], student(x, times[0])).detach()
        torch.testing.assert_close(landed, solve(process, teacher, x, *times), rtol=0, atol=0.02)


def test_shapes_that_disagree():
    span = Span(*(torch.tensor([value]) for value in (600.0, 500.0, 0.0)))
    with pytest.raises(InputError, match=r"tensors of one shape; got \(1, 3\) and \(1, 4\)"):
        Match(VP)(Gaussian(VP), Gaussian(VP), torch.zeros(1, 3), torch.zeros(1, 4), span)
