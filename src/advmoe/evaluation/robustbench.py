"""A Record in the format of RobustBench's model_info files."""

from advmoe.config.schema import fraction_text
from advmoe.evaluation.record import Record


def model_info(record: Record) -> dict[str, str | int | bool]:
    """The fields of a model_info file. `external` is RA-worst, or the worst case over fewer attacks, which a `footnote` then names;
    `unreliable` is true if RA-AA is too far above it.

    Generated training images are no additional data for RobustBench, whose entries name them in the footnote, too.
    """
    info: dict[str, str | int | bool] = {
        "link": "",
        "name": f"{record.method}, {record.backbone}",
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": record.dataset,
        "venue": "",
        "architecture": f"{record.backbone}, {record.method}",
        "eps": fraction_text(record.epsilon),
        "clean_acc": f"{record.sa:.2f}",
    }
    notes = []
    if record.config.section("data").get("generated") is not None:
        notes.append("It uses additional synthetic images in training.")
    if record.ra_worst is None:
        notes.append(f"external is the accuracy under {', '.join(record.evaluation.attacks) or 'some attacks'} only.")
    if notes:
        info["footnote"] = " ".join(notes)
    if record.ra_aa is not None:
        info["reported"] = info["autoattack_acc"] = f"{record.ra_aa:.2f}"
        info["unreliable"] = record.evaluation.autoattack_unreliable
    info["external"] = f"{record.worst:.2f}"
    return info
