"""Figures from Records alone. Each function draws one figure, PNG or PDF by the path's suffix; if no Record has the necessary
data, it writes nothing and returns False. Deviations are sample deviations over seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from advmoe.evaluation.record import Record
from advmoe.reports.cell import Cell, cell_of, grouped, is_full_scale
from advmoe.reports.measures import SUMMARY
from advmoe.reports.panels import by_line, by_panel, draw_curve, labels_of, legend_below, save, short, titled
from advmoe.reports.routes import fig_a1, load_heat_map
from advmoe.reports.styles import Line, attack_title, radius, style_of
from advmoe.reports.summaries import Summary, attacks_in_words, comparable_groups, differing_settings, interval, outcome, summarise

DRAWN = {measure.name: measure for measure in SUMMARY if measure.robust}
CELL: Callable[[Summary], Cell] = attrgetter("cell")
OF_NETWORK = ("model.backbone", "model.width")  # settings in which the networks of a frontier may differ
ASIDE = 1.06  # networks of about equal cost are drawn side by side, apart by this factor
SPREAD = 2.0  # or by less, so that each is drawn within this factor of its cost
TOGETHER = 1.3  # networks of one model scale that are drawn nearer than this factor have one label


def fig7(records: list[Record], path: Path) -> bool:
    """Robust accuracies of the five robust methods against model scale (Fig. 7): one row of panels for each group of comparable
    networks in which a method has several scales, and one panel for each measure; worst cases over other attacks are separate."""
    summaries = summarise(record for record in records if record.method != "standard")
    rows = [(group, panels) for group in comparable_groups(summaries) if _has_scales(group) and (panels := _panels(group))]
    if not rows:
        return False
    columns = max(len(panels) for _, panels in rows)
    labels = labels_of(by_line([one for group, _ in rows for one in group], CELL))
    figure = Figure(figsize=(3.3 * columns, 3.4 * len(rows) + 0.7), layout="constrained")
    for row, (group, panels) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        setting = group[0].cell.setting
        others = [other for other in summaries if other.cell.setting == setting]
        row.suptitle(
            titled(setting, [summary.n for summary in group], _detail(differing_settings(group[0], others))), fontsize=9
        )  # fmt: skip
        axes = row.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, panel in zip(axes, panels, strict=True):
            _against_scale(ax, panel, group, labels)
            plans = {attacks for name, attacks in panels if name == panel.name}
            ax.set_title(DRAWN[panel.name].label + (f"\n{_plan(panel.attacks)}" if len(plans) > 1 else ""))
        axes[0].set_ylabel("accuracy, %")
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


class Panel(NamedTuple):
    """What the accuracies in one panel share: the measure and, if it is a worst case, the attacks behind it."""

    name: str
    attacks: frozenset[str] | None


def _panels(summaries: Sequence[Summary]) -> list[Panel]:
    """The panels that these runs need. Seeds that were attacked differently have no common worst case, and so no panel."""
    drawn = [Panel(name, summary.attacks.get(name)) for name in DRAWN for summary in summaries if name in summary.figures]
    return list(dict.fromkeys(drawn))


def _has_scales(summaries: Iterable[Summary]) -> bool:
    """Whether a method was run at several model scales."""
    return any(len({summary.cell.model_scale for summary in members}) > 1 for members in by_line(summaries, CELL).values())


def _against_scale(ax: Axes, panel: Panel, summaries: Sequence[Summary], labels: Mapping[Line, str]) -> None:
    drawn = [one for one in summaries if panel.name in one.figures and one.attacks.get(panel.name) == panel.attacks]
    for line, members in by_line(drawn, CELL).items():
        members.sort(key=lambda summary: summary.cell.model_scale)
        figures = [summary.figures[panel.name] for summary in members]
        style = style_of(line)
        if is_full_scale(line.method):
            ax.axhline(figures[0].mean, color=style.colour, linestyle=style.dash, linewidth=0.8)
        ax.errorbar(
            [summary.cell.model_scale for summary in members], [figure.mean for figure in figures],
            yerr=[figure.std or 0.0 for figure in figures], color=style.colour, linestyle=style.dash, **style.marks(5),
            capsize=2, label=labels[line],
        )  # fmt: skip
    ax.set_xlabel("model scale r")
    ax.set_xticks(sorted({summary.cell.model_scale for summary in summaries}))
    ax.grid(alpha=0.3)


def _plan(attacks: frozenset[str] | None) -> str:
    return shorten(attacks_in_words(attacks or frozenset()), 60, placeholder=" …")


def _detail(texts: Iterable[str]) -> str:
    """A line of a title, empty if there is nothing to say."""
    line = shorten(", ".join(texts), 100, placeholder=" …")
    return f"{line}\n" if line else ""


def fig_a2(records: list[Record], path: Path) -> bool:
    """SA and RA on held-out images after every epoch, mean and band over seeds (Fig. A2)."""
    trained = [record for record in records if record.history]
    panels, labels = by_panel(trained), labels_of(by_line(trained, cell_of))
    if not panels:
        return False
    figure = Figure(figsize=(9, 3.5 * len(panels) + 0.7), layout="constrained")
    rows = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for row, (title, members) in zip(rows, panels, strict=True):
        row.suptitle(title, fontsize=9)
        pair = row.subplots(1, 2, sharey=True)
        for ax, name, text in zip(pair, ("val_sa", "val_ra"), ("SA", "RA (PGD-10)"), strict=True):
            _trajectories(ax, members, name, labels)
            ax.set(title=f"{text} on held-out images", xlabel="epoch", ylim=(0, 100))
        pair[0].set_ylabel("accuracy, %")
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


def _trajectories(ax: Axes, records: Iterable[Record], name: str, labels: Mapping[Line, str]) -> None:
    for line, members in by_line(records, cell_of).items():
        epochs = min(len(record.history) for record in members)  # a run that was cut short shortens its method's mean
        rows = [record.history[:epochs] for record in members]
        label = labels[line] + (", masks, then weights" if any(row.phase > 1 for row in rows[0]) else "")
        draw_curve(ax, line, [row.epoch for row in rows[0]], [[getattr(row, name) for row in run] for run in rows], label)
    ax.grid(alpha=0.3)


def epsilon(records: list[Record], path: Path) -> bool:
    """Accuracy against epsilon. If it does not fall towards 0 at a large epsilon, the attack failed; the network is not robust."""
    measured = [record for record in records if record.epsilon_curve and record.epsilon > 0]
    panels, labels = by_panel(measured), labels_of(by_line(measured, cell_of))
    if not panels:
        return False
    figure = Figure(figsize=(6.4, 3.8 * len(panels) + 0.7), layout="constrained")
    for ax, (title, members) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _against_epsilon(ax, members, labels)
        ax.set_title(title, fontsize=9)
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


def _against_epsilon(ax: Axes, records: Sequence[Record], labels: Mapping[Line, str]) -> None:
    first = records[0]
    assert first.epsilon_curve is not None
    for line, members in by_line(records, cell_of).items():
        measured = [record.epsilon_curve for record in members if record.epsilon_curve]
        curves = [curve for curve in measured if curve.epsilons == measured[0].epsilons]  # others have points at other radii
        multiples = [value / first.epsilon for value in curves[0].epsilons]
        draw_curve(ax, line, multiples, [curve.ra for curve in curves], labels[line])
    ax.axvline(1, color="#767676", linewidth=0.8)
    attack = attack_title(first.epsilon_curve.attack)
    ax.set(xlabel=f"radius of the attack, times {radius(first.epsilon)}", ylabel=f"accuracy under {attack}, %", ylim=(0, 100))
    text = f"{first.epsilon_curve.images} images"
    ax.annotate(text, (1, 1), (-4, -4), xycoords="axes fraction", textcoords="offset points", ha="right", va="top")
    ax.grid(alpha=0.3)


def frontier(records: list[Record], path: Path) -> bool:
    """The worst case against GMACs, one panel for each group of several networks that can be compared: the same setting apart from
    the network, and the same attacks.

    A ring and a line mark the networks on the frontier (`on_frontier`). Networks of about equal cost are drawn side by side, to the
    right of their cost.
    """
    summaries = summarise(records)
    measured = [(summary, name) for summary in summaries for name in summary.attacks]
    panels = {key: [summary for summary, _ in members] for key, members in grouped(measured, _frontier_key).items()}
    panels = {key: members for key, members in panels.items() if len(members) > 1}
    if not panels:
        return False
    labels = labels_of(by_line([one for members in panels.values() for one in members], CELL))
    figure = Figure(figsize=(7.2, 4.2 * len(panels) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, ((setting, panel, _), members) in zip(axes, panels.items(), strict=True):
        _against_cost(ax, panel.name, members, labels)
        others = [other for other in summaries if _without_network(other) == setting and panel.name in other.attacks]
        plans = [_plan(panel.attacks)] if len({other.attacks[panel.name] for other in others}) > 1 else []
        detail = _detail([*plans, *differing_settings(members[0], others, OF_NETWORK)])
        ax.set_title(titled(setting, [summary.figures[panel.name].n for summary in members], detail), fontsize=9)
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


def _without_network(summary: Summary) -> Cell:
    """The setting without the network."""
    return replace(summary.cell.setting, backbone="", width=None)


def _frontier_key(measured: tuple[Summary, str]) -> tuple[Cell, Panel, str]:
    """What the networks of a panel share, with the settings as text."""
    summary, name = measured
    shared = sorted((field, str(value)) for field, value in summary.shared.items() if field not in OF_NETWORK)
    return _without_network(summary), Panel(name, summary.attacks[name]), str(shared)


def _against_cost(ax: Axes, name: str, summaries: Sequence[Summary], labels: Mapping[Line, str]) -> None:
    several = len({summary.cell.backbone for summary in summaries}) > 1
    by_cost, drawn_at, last = sorted(summaries, key=_gmacs), dict[Cell, float](), 0.0
    aside = min(ASIDE, SPREAD ** (1 / len(by_cost)))
    for summary in by_cost:
        drawn_at[summary.cell] = last = max(_gmacs(summary), aside * last)
    for line, members in by_line(summaries, CELL).items():
        style = style_of(line)
        for summary in members:
            mean, (low, high) = summary.figures[name].mean, interval(summary, name)
            ax.errorbar(
                drawn_at[summary.cell], mean, yerr=[[mean - low], [high - mean]], color=style.colour, linestyle="",
                **style.marks(7), capsize=2, label=labels[line],
            )  # fmt: skip
    texts = grouped(by_cost, lambda one: f"{short(one.cell.backbone)}, " * several + f"r {one.cell.model_scale:g}")
    for text, members in texts.items():
        for near in _near(members, drawn_at):
            x, top = drawn_at[near[len(near) // 2].cell], max(interval(summary, name)[1] for summary in near)
            ax.annotate(text, (x, top), (0, 3), textcoords="offset points", fontsize=7, ha="center")
    best = on_frontier(summaries, name)
    xs, ys = [drawn_at[summary.cell] for summary in best], [summary.figures[name].mean for summary in best]
    if best:
        ax.plot(xs, ys, color="#767676", linewidth=0.9, zorder=0)
        ax.scatter(xs, ys, s=170, facecolors="none", edgecolors="#333333", linewidths=1.1, label="on the frontier")
    ax.set(xlabel="GMACs of one image (networks of about equal cost are side by side)", ylabel=f"{DRAWN[name].label}, %")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12, y=0.12)
    ax.grid(alpha=0.3)


def _near(summaries: Sequence[Summary], drawn_at: Mapping[Cell, float]) -> list[list[Summary]]:
    """Groups of the summaries, which are ordered by position. A position over TOGETHER times the last one starts a new group."""
    parts: list[list[Summary]] = []
    for summary in summaries:
        if not parts or drawn_at[summary.cell] > TOGETHER * drawn_at[parts[-1][-1].cell]:
            parts.append([])
        parts[-1].append(summary)
    return parts


def _gmacs(summary: Summary) -> float:
    return round(summary.figures["gmacs"].mean, 9)  # to one multiply-accumulate: a mean over equal counts is not exact


def on_frontier(summaries: Iterable[Summary], name: str) -> list[Summary]:
    """The networks, by rising cost, that are ahead (`summaries.outcome`) in `name` of every other one of the same or a lower cost.

    Only networks with several seeds are considered; empty if there are fewer than two.
    """
    ranked = sorted((summary for summary in summaries if summary.figures[name].n > 1), key=_gmacs)
    best = [
        one for one in ranked
        if all(outcome(one, other, name) == "ahead" for other in ranked if other is not one and _gmacs(other) <= _gmacs(one))
    ]  # fmt: skip
    return best if len(ranked) > 1 else []


FIGURES: Mapping[str, Callable[[list[Record], Path], bool]] = {
    "fig7": fig7,
    "figA2": fig_a2,
    "figA1": fig_a1,
    "load": load_heat_map,
    "frontier": frontier,
    "epsilon": epsilon,
}
