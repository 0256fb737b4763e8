"""Training curves and image grids."""

import pytest
import torch
from image_specs import image_spec
from matplotlib.image import imread
from saved_figures import record_saved_figures

from advmoe.models.resnet import ResNet
from advmoe.moe import DenseKind, MoEKind
from advmoe.reports import figures
from advmoe.reports.figures import image_grid, labels_and_routes, trajectories

CLASSES = ("cat", "dog", "ship")
MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-"}


def network(kind, channels=1):
    torch.manual_seed(0)
    spec = image_spec(3, [0.5] * channels, [0.5] * channels)
    return ResNet(kind, spec, blocks=(1, 1, 1), width=4, stem="cifar")


@pytest.fixture
def drawn(monkeypatch):
    return record_saved_figures(monkeypatch)


def history(*pairs):
    return [{"epoch": number + 1, "val_sa": sa, "val_ra": ra} for number, (sa, ra) in enumerate(pairs)]


@pytest.mark.parametrize("kind", MAGIC)
def test_trajectories_draw_the_histories(tmp_path, drawn, kind):
    path = tmp_path / f"curves.{kind}"
    trajectories({"advmoe": history((50, 20), (60, 30)), "at_dense": history((40, 10))}, path)
    assert path.read_bytes().startswith(MAGIC[kind])
    assert list(tmp_path.iterdir()) == [path]
    sa, ra = drawn[0].axes
    assert [line.get_label() for line in sa.lines] == ["advmoe", "at_dense"]
    assert (list(sa.lines[0].get_ydata()), list(ra.lines[0].get_ydata())) == ([50, 60], [20, 30])
    assert len({(line.get_color(), line.get_linestyle()) for line in sa.lines}) == 2
    assert "held-out" in sa.get_title()


@pytest.mark.parametrize("kind", MAGIC)
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_images_predictions_and_routes(tmp_path, drawn, kind, channels):
    model, path = network(MoEKind(0.5), channels), tmp_path / f"grid.{kind}"
    x = torch.rand(2, channels, 8, 8)
    x_adv = (x + 0.1).clamp(0, 1)
    labels = torch.tensor([0, 1])
    image_grid(model, x, x_adv, labels, CLASSES, path)
    assert path.read_bytes().startswith(MAGIC[kind])
    assert list(tmp_path.iterdir()) == [path]
    axes = drawn[0].axes
    assert len(axes) == 6
    for row in range(2):
        for ax, z in ((axes[3 * row], x), (axes[3 * row + 2], x_adv)):
            (view,) = labels_and_routes(model, z[row : row + 1], CLASSES)
            truth = CLASSES[int(labels[row])]
            assert ax.get_title() == (view.label if view.label == truth else f"{view.label} (wrong)")
            assert ax.get_xlabel().endswith(f"\n{view.route}")
        assert "of 6 layers rerouted" in axes[3 * row + 1].get_xlabel()


def test_png_can_be_read(tmp_path):
    trajectories({"advmoe": history((50, 20))}, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[0] > 100


def test_a_route_has_one_digit_for_each_layer_in_groups_of_four():
    model = network(MoEKind(0.5, num_experts=3))
    x = torch.rand(3, 1, 8, 8)
    routings = model.eval().forward_routed(x)[1]
    for row, view in enumerate(labels_and_routes(model, x, CLASSES)):
        digits = [str(int(routing.experts[row])) for routing in routings]
        assert view.route == "".join(digits[:4]) + " " + "".join(digits[4:])


def test_dense_network_has_no_route(tmp_path, drawn):
    model, x = network(DenseKind()), torch.rand(1, 1, 8, 8)
    image_grid(model, x, x, torch.tensor([0]), CLASSES, tmp_path / "grid.png")
    assert drawn[0].axes[1].get_xlabel() == ""


def test_the_networks_mode_does_not_change():
    model = network(MoEKind(0.5)).train()
    labels_and_routes(model, torch.rand(2, 1, 8, 8), CLASSES)
    assert model.training


def test_failed_figure_leaves_neither_draft_nor_damage(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(self, draft, **_):
        draft.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        trajectories({"advmoe": history((50, 20))}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["$\\frac$", "<script>", "two\nlines", "long " * 200], ids=["$", "tag", "lines", "long"])
def test_class_names_are_drawn_literally(tmp_path, drawn, name):
    x = torch.rand(1, 1, 8, 8)
    image_grid(network(MoEKind(0.5)), x, x, torch.tensor([0]), (name,) * 3, tmp_path / "grid.png")
    title = drawn[0].axes[0].get_title()
    assert title.startswith(" ".join(name.split())[:20])
    assert len(title) < 40
    trajectories({name: history((50, 20))}, tmp_path / "curves.png")
