"""Figures from Records: what is drawn, and when nothing is drawn."""

import pytest
from matplotlib.text import Text
from records import attacked, old_record, record, runs, with_settings
from records import quick as by_quick

from advmoe.reports.panels import FEW_LINES
from advmoe.reports.plots import FIGURES, epsilon, fig7, fig_a2, frontier, on_frontier
from advmoe.reports.summaries import summarise

METHODS = ("at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")


@pytest.fixture(scope="module")
def grid():
    """Five methods, two model scales where they have one, two seeds."""
    scales = {method: (0.5,) if method == "at_dense" else (0.2, 0.5) for method in METHODS}
    return [record(method, seed, scale) for method in METHODS for scale in scales[method] for seed in (0, 1)]


def drawn_by_label(ax):
    """Pairs of a label of the legend and its curve, or the marks of its error bars."""
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        if hasattr(line, "get_xdata"):
            yield label, line


def lines(ax):
    """Label -> (x, y) of the curves and error bars in the legend."""
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in drawn_by_label(ax)}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_written_as_png(tmp_path, grid, name):
    path = tmp_path / f"{name}.png"
    assert FIGURES[name](grid, path) is True
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", FIGURES)
def test_no_file_is_written_without_the_data_that_a_figure_needs(tmp_path, name):
    assert FIGURES[name]([old_record()], tmp_path / "figure.png") is False
    assert FIGURES[name]([], tmp_path / "figure.png") is False
    assert list(tmp_path.iterdir()) == []


def test_fig7_has_a_panel_for_each_measure_and_a_mark_for_each_scale(tmp_path, grid, drawn):
    fig7([*grid, record("standard")], tmp_path / "fig7.png")
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles == ["RA-worst", "RA-50", "RA-AA"]
    robust = lines(drawn[0].axes[1])
    assert set(robust) == {"AdvMoE, N 2", "AT (Dense)", "AT (S-Dense)", "AT (Sparse)", "AT (MoE), N 2"}
    assert robust["AdvMoE, N 2"] == ([0.2, 0.5], pytest.approx([48.25, 51.25]))  # 49 + 10 (r - 0.5) + seed / 2 + 2, two seeds
    assert robust["AT (Dense)"] == ([1.0], pytest.approx([57.25]))


def test_fig7_needs_two_scales_of_a_method(tmp_path):
    assert not fig7([record("at_dense"), record("advmoe")], tmp_path / "fig7.png")


def test_quick_worst_case_has_a_separate_panel(tmp_path, drawn):
    quick = [by_quick(record("advmoe", 0, scale, ra_worst=..., ra_worst_quick=33.0)) for scale in (0.2, 0.5)]
    fig7([*quick, record("at_moe", 0, 0.2), record("at_moe", 0, 0.5)], tmp_path / "fig7.png")
    panels = {ax.get_title(): lines(ax) for ax in drawn[0].axes}
    assert list(panels["RA-worst"]) == ["AT (MoE), N 2"]
    assert panels["RA-worst (quick)"] == {"AdvMoE, N 2": ([0.2, 0.5], [33.0, 33.0])}


def test_fig7_has_no_mean_of_seeds_that_were_attacked_differently(tmp_path, drawn):
    runs = [record("advmoe", seed, scale) for scale in (0.2, 0.5) for seed in (0, 1)]
    mixed = [attacked(run, "pgd_10") if (run.seed, run.config.model.model_scale) == (1, 0.5) else run for run in runs]
    fig7(mixed, tmp_path / "fig7.png")
    worst, ra_50, _ = drawn[0].axes
    assert lines(worst)["AdvMoE, N 2"] == ([0.2], pytest.approx([46.25]))
    assert lines(ra_50)["AdvMoE, N 2"][0] == [0.2, 0.5]


def test_fig7_separates_worst_cases_over_other_attacks_and_other_settings(tmp_path, drawn):
    runs = [record(method, 0, scale) for method in ("at_small_dense", "at_moe", "advmoe") for scale in (0.2, 0.5)]
    other = [attacked(run, "pgd_10") if run.method == "at_moe" else run for run in runs]
    other = [with_settings(run, "training", lr=0.05) if run.method == "advmoe" else run for run in other]
    fig7(other, tmp_path / "fig7.png")
    first, second = drawn[0].subfigs
    assert [ax.get_title() for ax in first.axes] == ["RA-worst\npgd_50", "RA-worst\npgd_10", "RA-50", "RA-AA"]
    assert [list(lines(ax)) for ax in first.axes[:2]] == [["AT (S-Dense)"], ["AT (MoE), N 2"]]
    assert [list(lines(ax)) for ax in second.axes] == [["AdvMoE, N 2"]] * 3
    assert "training.lr 0.1\n" in first._suptitle.get_text()
    assert "training.lr 0.05\n" in second._suptitle.get_text()


def test_other_settings_are_in_separate_rows(tmp_path, drawn):
    scales = (0.2, 0.5)
    fig7([record("advmoe", 0, r) for r in scales] + [record("advmoe", 0, r, dataset="other") for r in scales], tmp_path / "a.png")
    assert len(drawn[0].axes) == 6
    assert ["other" in row._suptitle.get_text() for row in drawn[0].subfigs] == [False, True]


def test_fig_a2_has_means_over_seeds_and_both_phases(tmp_path, grid, drawn):
    fig_a2(grid, tmp_path / "a2.png")
    assert len(drawn[0].axes) == 4  # two scales, SA and RA
    clean = lines(drawn[0].axes[0])
    assert set(clean) == {"AdvMoE, N 2", "AT (Dense)", "AT (S-Dense)", "AT (Sparse), masks, then weights", "AT (MoE), N 2"}
    assert clean["AdvMoE, N 2"][0] == [1, 2, 3, 4, 5, 6]
    assert clean["AdvMoE, N 2"][1][0] == pytest.approx(0.4 * 76.25)  # r 0.2, SA of two seeds, first epoch
    assert clean["AT (Sparse), masks, then weights"][0][-1] == 12
    assert len(drawn[0].axes[0].collections) == 5  # a band each


def test_fig_a2_accepts_a_run_with_fewer_epochs(tmp_path, drawn):
    short = record("advmoe", 1)
    short.history = short.history[:3]
    fig_a2([record("advmoe", 0), short], tmp_path / "a2.png")
    assert lines(drawn[0].axes[0])["AdvMoE, N 2"][0] == [1, 2, 3]


def test_accuracy_against_epsilon_starts_clean(tmp_path, drawn):
    epsilon([record("at_dense"), record("advmoe")], tmp_path / "epsilon.png")
    multiples, accuracies = lines(drawn[0].axes[0])["AdvMoE, N 2"]
    assert multiples == pytest.approx([0, 0.25, 0.5, 1, 1.5, 2, 4])
    assert accuracies == pytest.approx([79.0, 72.5, 66.0, 53.0, 40.0, 27.0, 0.0])
    assert drawn[0].axes[0].get_xlabel() == "radius of the attack, times epsilon 0.1"


def test_epsilon_of_zero_has_no_multiples(tmp_path):
    assert not epsilon([record("advmoe", epsilon=0.0)], tmp_path / "epsilon.png")


def test_frontier_has_the_networks_that_are_ahead_of_all_that_cost_as_much_or_less():
    """The dense network costs 0.04 GMACs, the others 0.01."""

    def best(**figures):
        return [one.cell.method for one in on_frontier(summarise(runs(**figures)), "ra_worst")]

    assert best(at_dense=56.0, at_small_dense=46.0, advmoe=50.0) == ["advmoe", "at_dense"]
    assert best(at_dense=50.5, at_small_dense=46.0, advmoe=50.0) == ["advmoe"]  # the dense network is not apart
    assert best(at_dense=56.0, at_small_dense=49.5, advmoe=50.0) == ["at_dense"]  # neither of equal cost is ahead
    assert best(advmoe=50.0) == []
    assert best(seeds=(0,), at_dense=56.0, advmoe=50.0) == []
    # the mean of three equal costs is lower than the mean of two
    seeds = [("at_moe", 40.0, seed) for seed in range(3)] + [("advmoe", 50.0, seed) for seed in range(2)]
    equal = [record(method, seed, gmacs=0.007781088, ra_worst=share, test_images=10_000) for method, share, seed in seeds]
    assert [one.cell.method for one in on_frontier(summarise(equal), "ra_worst")] == ["advmoe"]
    alone = [run for run in runs(at_dense=56.0, at_small_dense=46.0, advmoe=50.0) if (run.method, run.seed) != ("at_dense", 1)]
    assert [one.cell.method for one in on_frontier(summarise(alone), "ra_worst")] == ["advmoe"]  # one seed is not ranked


def rings(ax):
    """The centres of the rings."""
    found = [collection for collection in ax.collections if collection.get_label() == "on the frontier"]
    return [offset for collection in found for offset in collection.get_offsets().tolist()]


def test_frontier_rings_its_networks_and_separates_quick_figures(tmp_path, drawn):
    quick = [by_quick(record(method, 0, 0.5, ra_worst=..., ra_worst_quick=60.0)) for method in ("at_moe", "advmoe")]
    frontier([*runs(at_dense=56.0, at_small_dense=46.0, advmoe=50.0), *quick], tmp_path / "frontier.png")
    full, other = drawn[0].axes
    assert (full.get_ylabel(), other.get_ylabel()) == ("RA-worst, %", "RA-worst (quick), %")
    for (gmacs, share), expected in zip(rings(full), ([0.01, 48.0], [0.04, 54.0]), strict=True):
        assert gmacs == pytest.approx(expected[0], rel=0.13)  # marks of about the same cost are drawn beside each other
        assert share == expected[1]
    assert rings(other) == []
    assert "on the frontier" in [text.get_text() for text in drawn[0].legends[0].get_texts()]


def test_networks_of_about_equal_cost_are_side_by_side_and_their_scale_is_written_once(tmp_path, drawn):
    costs = {"at_small_dense": 0.01, "at_sparse": 0.01, "at_moe": 0.0105, "advmoe": 0.02}
    frontier([record(method, gmacs=gmacs) for method, gmacs in costs.items()], tmp_path / "frontier.png")
    (ax,) = drawn[0].axes
    places = [place for (place,), _ in lines(ax).values()]
    assert sorted(places) == pytest.approx([0.01, 0.0106, 0.0106 * 1.06, 0.02])
    assert [text.get_text() for text in ax.texts] == ["r 0.5", "r 0.5"]  # one for three networks, one for AdvMoE
    assert [text.xy[0] for text in ax.texts] == pytest.approx([0.0106, 0.02])


def test_many_networks_of_equal_cost_are_drawn_near_their_cost(tmp_path, drawn):
    networks = [with_settings(record(), "training", beta=float(beta)) for beta in range(7, 67)]
    others = [with_settings(record(gmacs=0.0107), "training", ema=0.9 + number / 1000) for number in range(60)]
    frontier([*networks, *others, record("at_dense", gmacs=0.03)], tmp_path / "frontier.png")
    *near, dense = sorted(line.get_xdata()[0] for _, line in drawn_by_label(drawn[0].axes[0]))
    assert dense == 0.03
    assert len(set(near)) == len(networks) + len(others)
    assert 0.01 <= near[0] < near[-1] <= 2 * 0.0107


def test_a_legend_has_as_many_columns_as_fit(tmp_path, drawn):
    long = [with_settings(record(method), "training", ema=0.995, label_smoothing=0.1) for method in METHODS]
    for networks in (map(record, METHODS), long):
        frontier(list(networks), tmp_path / "frontier.png")
    short, wide = (figure.legends[0] for figure in drawn)
    assert (short._ncols, wide._ncols) == (3, 2)
    assert wide.get_window_extent().width <= drawn[1].bbox.width


def test_lines_that_look_the_same_share_a_label_if_there_are_many(tmp_path, drawn):
    betas = [with_settings(record(), "training", beta=float(beta)) for beta in range(7, 7 + FEW_LINES)]
    same_batches = with_settings(record(), "training", level_batches="same")
    other_data = record(dataset="other"), with_settings(record(dataset="other"), "training", beta=7.0)
    unknown = [record(), record()]
    for run, name in zip(unknown, ("mine", "yours"), strict=True):
        run.method = name
    for networks in (betas, [*betas, record(), record("at_dense"), same_batches, *unknown, *other_data]):
        frontier(networks, tmp_path / "frontier.png")
    few, many = ({text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()} for figure in drawn)
    assert few == {f"AdvMoE, beta {beta}, N 2" for beta in range(7, 7 + FEW_LINES)}
    assert many == {
        "AdvMoE, other options, N 2", "AdvMoE, N 2", "AT (Dense)", "AdvMoE, same batches, N 2", "mine, N 2", "yours, N 2",
    }  # fmt: skip


def test_frontier_separates_networks_that_cannot_be_compared(tmp_path, drawn):
    """Other attacks, or other settings of the training, are other panels; seeds attacked differently have no point."""
    methods = ("at_dense", "at_small_dense", "at_sparse", "at_moe")
    networks = [record(method) for method in methods]
    other = [attacked(run, "pgd_10") if run.method in methods[2:] else run for run in networks]
    seeds = [record("advmoe", 0), attacked(record("advmoe", 1), "pgd_10")]
    frontier([*other, *seeds], tmp_path / "frontier.png")
    first, second = drawn[0].axes
    assert (list(lines(first)), list(lines(second))) == (["AT (Dense)", "AT (S-Dense)"], ["AT (Sparse)", "AT (MoE), N 2"])
    assert [ax.get_title().splitlines()[2] for ax in drawn[0].axes] == ["pgd_50", "pgd_10"]
    for run in networks[2:]:
        with_settings(run, "training", lr=0.05)
    frontier(networks, tmp_path / "frontier.png")
    assert [ax.get_title().splitlines()[2] for ax in drawn[1].axes] == ["training.lr 0.1", "training.lr 0.05"]


def test_networks_of_other_backbones_are_in_one_panel_of_the_frontier(tmp_path, drawn):
    other = with_settings(record(backbone="vgg16_bn"), "model", backbone="vgg16_bn")
    frontier([record(), other], tmp_path / "frontier.png")
    assert len(drawn[0].axes) == 1


def test_frontier_needs_two_networks(tmp_path):
    assert not frontier([record("advmoe", 0), record("advmoe", 1)], tmp_path / "frontier.png")


def test_methods_differ_in_colour_dash_and_marker(tmp_path, grid, drawn):
    fig_a2(grid, tmp_path / "a2.png")
    curves = drawn[0].axes[0].lines
    assert len({line.get_color() for line in curves}) == len({line.get_marker() for line in curves}) == 5
    assert len({str(line._dash_pattern) for line in curves}) == 5


def test_ablations_are_drawn_unlike_their_method(tmp_path, drawn):
    same_batches = with_settings(record("advmoe"), "training", level_batches="same")
    one_expert = record("advmoe", num_experts=1)
    for draw in (fig_a2, frontier):
        draw([record("advmoe"), one_expert, same_batches], tmp_path / "figure.png")
    curves = {line.get_label(): line for line in drawn[0].axes[0].lines}
    full, single, same = (curves[label] for label in ("AdvMoE, N 2", "AdvMoE, N 1", "AdvMoE, same batches, N 2"))
    assert len({line.get_markerfacecolor() for line in (full, single, same)}) == 3
    assert (full.get_color(), full.get_marker()) == (single.get_color(), single.get_marker())
    assert (full.get_color(), full.get_marker()) != (same.get_color(), same.get_marker())
    marks = drawn[1].axes[0].lines
    assert {"white", full.get_color(), same.get_color()} <= {mark.get_markerfacecolor() for mark in marks}


def test_numbers_of_experts_differ_in_their_marks_and_in_the_legend(tmp_path, drawn):
    numbers = (1, 2, 3, 4, 5, 8, 10, 16)
    runs = [record("advmoe", 0, scale, num_experts=n) for n in numbers for scale in (0.2, 0.5)]
    for draw in (fig7, fig_a2, epsilon, frontier):
        draw(runs, tmp_path / "figure.png")
    labels = [f"AdvMoE, N {n}" for n in numbers]
    for figure in drawn:
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert [text for text in texts if text != "on the frontier"] == labels
        drawn_lines = {label: line for ax in figure.axes for label, line in drawn_by_label(ax)}
        marks = {(line.get_marker(), line.get_fillstyle(), line.get_markerfacecolor()) for line in drawn_lines.values()}
        assert len(marks) == len(drawn_lines) == len(numbers)


def test_curves_of_other_radii_are_not_averaged(tmp_path, drawn):
    first, other = record("advmoe", 0), record("advmoe", 1)
    other.epsilon_curve.epsilons = tuple(2 * value for value in other.epsilon_curve.epsilons)
    epsilon([first, other], tmp_path / "figure.png")
    ((_, curve),) = drawn_by_label(drawn[0].axes[0])
    assert list(curve.get_ydata()) == pytest.approx(list(first.epsilon_curve.ra))


@pytest.mark.parametrize("name", ["$\\frac$<script>alert(1)</script>", "two\nlines $" + " long" * 200], ids=["signs", "long"])
def test_every_figure_is_written_as_pdf_with_names_from_data_drawn_literally(tmp_path, drawn, name):
    """A $ starts no formula, a name is on one line, and a long one is cut."""
    odd = {"classes": [name] * 4, "dataset": name, "backbone": name, "norm": name}
    runs = [record("advmoe", 0, scale, depth=1, epochs=2, **odd) for scale in (0.2, 0.5)]
    for figure, draw in FIGURES.items():
        assert draw(runs, tmp_path / f"{figure}.pdf")
        assert (tmp_path / f"{figure}.pdf").read_bytes().startswith(b"%PDF-")
    texts = [text.get_text() for figure in drawn for text in figure.findobj(Text)]
    prefix = " ".join(name.split())[:20]
    assert len([text for text in texts if prefix in text]) > len(drawn)
    assert max(len(line) for text in texts for line in text.splitlines()) < 200
