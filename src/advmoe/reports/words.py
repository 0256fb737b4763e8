"""The words that the report's page explains: methods, measures, letters."""

from advmoe.reports.measures import MEASURES

WORDS = (
    ("standard training", "training on clean images only"),
    ("AT", "adversarial training: the network learns on images that an attack has changed"),
    ("AT (Dense)", "adversarial training of the dense network, the full one"),
    ("AT (S-Dense)", "adversarial training of a small dense network, of about the cost of one expert"),
    ("AT (Sparse)", "adversarial training of the dense network with masks that leave out channels"),
    ("AT (MoE)", "adversarial training of a mixture of experts (MoE): in every MoE layer a router picks one expert for each image"),
    ("AdvMoE", "the same network; its routers and the other weights are trained in turn, on different batches"),
    (
        "with -plus",
        "with the options that the suffix -plus adds to a recipe: SiLU, a moving average of the weights and, in a network with "
        "routers, experts whose filters are kept equal for half of the epochs",
    ),
    ("the control", "the same network with one expert, so without a choice: usually AT (MoE)"),
    ("r", "model scale: the share of the dense network's channels that one expert, or a small network, has"),
    ("N", "experts in each MoE layer"),
    ("n", "number of seeds: trainings that differ in their random numbers only"),
    ("epsilon", "the attack's radius: in Linf, the largest change of a pixel, whose values are in [0, 1]"),
    ("PGD", "projected gradient descent: an attack in small steps that raise the loss"),
    *((measure.label, measure.meaning) for measure in MEASURES if measure.meaning),
    ("RA-router", "accuracy with the experts applied to the clean image along the adversarial image's route"),
    ("RA-expert", "accuracy with the experts applied to the adversarial image along the clean image's route"),
)
