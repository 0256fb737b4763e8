"""Titles, captions and alternative texts of the report's figures, in order."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """A figure's title, caption, alternative text for screen readers, and the data that a Record needs for it."""

    title: str
    text: str
    alt: str
    needs: str


CAPTIONS = {
    "fig7": Caption(
        "Robustness against model scale", "After Fig. 7. Marks are means over seeds, bars one sample deviation.",
        "Line charts, one for each measure of robust accuracy: a line a method, the model scale r across, percent upwards. "
        "The tables above hold the same figures.",
        "a method at two model scales or more",
    ),
    "frontier": Caption(
        "Robustness against cost",
        "Bars are 95 % intervals over seeds and images. Ringed and joined: the networks on the frontier, which no cheaper one "
        "matches.",
        "Scatter charts of the worst robust accuracy, upwards, against billions of multiply-accumulates, across. "
        "The first table holds the same figures.",
        "two networks of one setting",
    ),
    "figA2": Caption(
        "Accuracy after every epoch",
        "After Fig. A2, on held-out images of the training set. Bands are one sample deviation over seeds.",
        "Line charts of clean and robust accuracy against the epoch, a line a method. Each run's epochs stand under Runs.",
        "accuracies after every epoch",
    ),
    "epsilon": Caption(
        "Accuracy against the attack's radius", "A curve that does not fall towards 0 at a large radius tells of a misled attack, "
        "not of a robust network.",
        "Line charts of accuracy under attack, upwards, against its radius, across. Each run's values stand under Runs.",
        "accuracies at several radii",
    ),
    "figA1": Caption(
        "The MoE structure and one image's pathway", "After Fig. A1, of a trained network. Filled: the chosen experts; hatched: "
        "where an attack leads elsewhere.",
        "Above, one MoE layer: the input goes to a router, which picks one of the experts. Below, a column of experts for each MoE "
        "layer with the chosen one filled. The gallery lists such routes as text.",
        "MoE layers and an image with its route",
    ),
    "load": Caption(
        "Load of the experts by class",
        "The share of each class's clean images that an expert takes, layer by layer, first seed.",
        "Heat maps: a row a class, a column an expert, layers side by side; the lighter, the larger the share.",
        "counts of clean images by expert and class",
    ),
}  # fmt: skip
