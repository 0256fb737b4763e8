"""Titles, captions and alternative texts of the report's figures, in order."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """A figure's title, caption, alternative text for screen readers, and the data that a Record needs for it."""

    title: str
    text: str
    alt: str
    needs: str


ALIKE = "Each panel has networks that were trained with the same settings and attacked by the same attacks. "
EXPERTS = "Marks of networks with other numbers of experts N differ: hollow for one, full for two; the legend names N."

CAPTIONS = {
    "fig7": Caption(
        "Robustness against model scale",
        "After Fig. 7. Marks are means over seeds, bars one sample deviation. " + ALIKE + EXPERTS,
        "Line charts, one for each measure of robust accuracy: one line a method, x axis: model scale r, y axis: percent. "
        "The tables above hold the same figures.",
        "a method at two model scales or more",
    ),
    "frontier": Caption(
        "Robustness against cost",
        "Networks of about equal cost are drawn side by side, to the right of it; the first table has their costs. Bars are 95 % "
        "intervals over seeds and images, with one seed only over images. A ring marks a network whose interval is above those of "
        "all others of the same or a lower cost. Networks with one seed are not ranked, so they have no ring. " + ALIKE + EXPERTS,
        "Scatter charts: y axis worst-case robust accuracy, x axis billions of multiply-accumulates. "
        "The first table holds the same figures.",
        "two networks of one setting",
    ),
    "figA2": Caption(
        "Accuracy after every epoch",
        "After Fig. A2, on held-out images of the training set. Bands are one sample deviation over seeds. " + EXPERTS,
        "Line charts of clean and robust accuracy against the epoch, one line a method. The section Runs lists each run's epochs.",
        "accuracies after every epoch",
    ),
    "epsilon": Caption(
        "Accuracy against the attack's radius", "If a curve does not fall towards 0 at a large radius, the attack failed; "
        "the network is not robust. " + EXPERTS,
        "Line charts: y axis accuracy under attack, x axis the attack's radius. The section Runs lists each run's values.",
        "accuracies at several radii",
    ),
    "figA1": Caption(
        "The MoE structure and one image's pathway", "After Fig. A1, for a trained network. Filled: the chosen experts; hatched: "
        "the experts chosen under attack, where they differ.",
        "Above, one MoE layer: the input goes to a router, which picks one of the experts. Below, a column of experts for each MoE "
        "layer with the chosen one filled. The gallery lists such routes as text.",
        "MoE layers and an image with its route",
    ),
    "load": Caption(
        "Load of the experts by class",
        "The share of each class's clean images that an expert takes, layer by layer; first seed, networks with several experts.",
        "Heat maps: one row a class, one column an expert, layers side by side; lighter means a larger share.",
        "several experts, and counts of clean images by expert and class",
    ),
}  # fmt: skip
