"""The gallery of the page: images at every epsilon of the slider, with routes and perturbations."""

import base64
import io

import numpy as np
from PIL import Image
from records import content, decoded, png, record

from advmoe.reports.gallery import gallery_of, perturbation


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_slider_has_every_epsilon_in_order_and_starts_at_that_of_the_evaluation():
    gallery = gallery_of(record())
    assert gallery.radii == (
        "epsilon 0", "1/4 of epsilon 0.1", "1/2 of epsilon 0.1", "epsilon 0.1", "3/2 of epsilon 0.1", "2 of epsilon 0.1",
    )  # fmt: skip
    assert (gallery.start, gallery.colour) == (3, False)
    assert [step.number for step in gallery.entries[0].steps] == list(range(6))
    assert [step.kind for step in gallery.entries[0].steps] == ["no attack", *["PGD-50"] * 5]
    assert [step.attacked.right for step in gallery.entries[0].steps] == [True, True, True, False, False, False]


def test_records_without_steps_show_clean_and_attacked_images():
    images = [{name: value for name, value in image.items() if name != "steps"} for image in content()["gallery"]]
    gallery = gallery_of(record(gallery=images))
    assert (gallery.radii, gallery.start) == (("epsilon 0", "epsilon 0.1"), 1)
    assert all(len(entry.steps) == 2 for entry in gallery.entries)
    assert gallery_of(record(gallery=[])) is None


def test_only_epsilons_that_every_image_has_are_shown():
    images = content()["gallery"]
    images[1]["steps"] = images[1]["steps"][:1]
    assert gallery_of(record(gallery=images)).radii == ("epsilon 0", "1/4 of epsilon 0.1", "epsilon 0.1")


def test_epsilons_without_a_plain_ratio_are_given_as_they_are():
    images = content()["gallery"]
    for image in images:
        image["steps"] = [image["steps"][0] | {"epsilon": 1e14}]
    assert gallery_of(record(gallery=images)).radii[-1] == "epsilon 1e+14"
    assert gallery_of(record(epsilon=0, gallery=images)).radii == ("epsilon 0", "epsilon 1e+14")


def test_routes_are_compared_layer_by_layer():
    step = gallery_of(record()).entries[0].steps[3]
    assert [layer.number for layer in step.route if layer.changed] == [2, 5, 8]
    assert step.summary == "3 of 8 routers choose another expert than for the clean image"
    assert (step.attacked.answer, step.attacked.right, step.attacked.confidence) == ("trouser", False, "61 %")
    assert not any(layer.changed for layer in gallery_of(record()).entries[0].steps[1].route)


def test_networks_without_routers_have_no_route():
    step = gallery_of(record("at_dense")).entries[0].steps[3]
    assert (step.route, step.summary) == ((), "")


def test_classes_without_names_are_numbered():
    assert gallery_of(record(classes=[])).entries[1].label == "class 1"


def test_the_perturbation_is_scaled_around_mid_grey():
    assert decoded(perturbation(encoded([[10, 20, 30]]), encoded([[10, 22, 26]]))).tolist() == [[128, 191, 1]]
    assert decoded(perturbation(png(0), png(0)))[0, 0] == 128
    assert decoded(perturbation(encoded([[[0, 0, 0]]]), encoded([[[0, 4, 2]]]))).tolist() == [[[128, 255, 191]]]
    assert perturbation(encoded([[0]]), encoded([[0, 0]])) == ""


def test_colour_images_are_distinguished_from_grey_ones():
    images = content()["gallery"]
    images[0]["clean"]["png"] = encoded(np.zeros((28, 28, 3)))
    gallery = gallery_of(record(gallery=images))
    assert gallery.colour
    assert gallery.entries[0].steps[3].change == ""  # the attacked one is grey
