"""The MoE structure with a pathway, and loads by class."""

from records import record

from advmoe.reports.routes import fig_a1, load_heat_map


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_pathway_is_of_the_run_nearest_to_the_appendix(tmp_path, drawn):
    runs = [record("at_moe", 0, 0.25, num_experts=4), record("advmoe", 0, 0.5), record("advmoe", 0, 0.25, num_experts=4)]
    fig_a1(runs, tmp_path / "a1.png")
    layer, pathway = drawn[0].axes[:2]
    assert layer.get_title() == "MoE layer stage1.0: N = 4, r = 0.25"
    assert pathway.get_title().startswith("AdvMoE, resnet18, fashion-mnist: PGD-50 changes the choice of 3 of 8 routers")


def test_pathway_follows_the_clean_route_and_the_one_under_attack(tmp_path, drawn):
    run = record("advmoe", 0, 0.25, num_experts=4)
    fig_a1([run], tmp_path / "a1.png")
    pathway = drawn[0].axes[1]
    image = run.gallery[0]
    assert [list(line.get_ydata()) for line in pathway.lines] == [image.clean.route, image.adversarial.route]
    assert "answer: T-shirt\n\nunder attack:\ntrouser" in texts(pathway)
    assert len([patch for patch in pathway.patches if patch.get_hatch()]) == 3


def test_one_router_for_the_network_chooses_in_every_layer(tmp_path, drawn):
    run = record("advmoe")
    for image in run.gallery:
        image.clean.route, image.adversarial.route, image.steps = [1], [0], []
    fig_a1([run], tmp_path / "a1.png")
    pathway = drawn[0].axes[1]
    assert [list(line.get_ydata()) for line in pathway.lines] == [[1] * 8, [0] * 8]
    assert "1 of 1 routers" in pathway.get_title()
    assert "router\npool, standardise, linear" in texts(drawn[0].axes[0])
    run.config.model = run.config.model.model_copy(update={"routers": "per_network"})
    fig_a1([run], tmp_path / "a1.png")
    assert "router of all layers\na CNN on the image" in texts(drawn[1].axes[0])


def test_a_stages_router_chooses_in_all_its_layers(tmp_path, drawn):
    run = record("advmoe")
    run.config.model = run.config.model.model_copy(update={"routers": "per_stage"})
    for number, layer in enumerate(run.layers):
        layer.stage = 0 if number < 3 else 1
    for image in run.gallery:
        image.clean.route, image.adversarial.route, image.steps = [1, 0], [0, 0], []
    fig_a1([run], tmp_path / "a1.png")
    above, below = drawn[0].axes[:2]
    assert [list(line.get_ydata()) for line in below.lines] == [[1] * 3 + [0] * 5, [0] * 8]
    assert "1 of 2 routers" in below.get_title()
    assert "router of the stage\npool, standardise, linear" in texts(above)


def test_dense_networks_have_no_pathway(tmp_path):
    assert not fig_a1([record("at_dense"), record("at_small_dense")], tmp_path / "a1.png")
    assert not load_heat_map([record("at_dense"), record("at_small_dense")], tmp_path / "load.png")


def test_heat_map_has_each_class_and_expert_in_percent_of_the_class(tmp_path, drawn):
    one_expert = record("at_moe", 0, num_experts=1)
    load_heat_map([record("advmoe", 1), record("advmoe", 0), record("at_moe", 0), one_expert], tmp_path / "load.png")
    first, second, _ = drawn[0].axes  # the last one is the colour bar
    assert (first.get_title(), second.get_title()) == (
        "AdvMoE, N = 2, r = 0.5: fashion-mnist, resnet18, seed 0",
        "AT (MoE), N = 2, r = 0.5: fashion-mnist, resnet18, seed 0",
    )
    shares = first.images[0].get_array()
    assert shares.shape == (4, 8 * 2)
    assert shares[0, :4].tolist() == [80, 20, 20, 80]  # 60 of 75 images, the other expert in the second layer
    assert [label.get_text() for label in first.get_yticklabels()] == ["T-shirt", "trouser", "pullover", "dress"]


def test_a_class_without_images_is_drawn_as_empty(tmp_path, drawn):
    run = record("advmoe")
    for layer in run.load_by_class:
        layer[2] = [0, 0]
    assert load_heat_map([run], tmp_path / "load.png")
    assert drawn[0].axes[0].images[0].get_array()[2].tolist() == [0] * 16


def test_of_many_classes_only_some_are_labelled(tmp_path, drawn):
    run = record("advmoe", classes=[f"class {number}" for number in range(100)], load_by_class=[[[5, 5]] * 100] * 8)
    load_heat_map([run], tmp_path / "load.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert (labels[0], labels[1], len(labels)) == ("class 0", "class 4", 25)
