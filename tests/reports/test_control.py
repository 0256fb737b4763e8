from records import record

from advmoe.reports.control import comparison_line, worst_case_difference


def with_flags(flags, **fields):
    result = record(**fields)
    result.evaluation.flags = flags
    return result


def test_a_network_is_compared_with_its_control_image_by_image():
    pair = with_flags("1110" * 25), with_flags("1011" * 25, run="one-expert")
    assert worst_case_difference([pair]).value == 0
    assert worst_case_difference([]) is None
    ahead = with_flags("1" * 60 + "0" * 40), with_flags("1" * 30 + "0" * 70, run="one-expert")
    line = comparison_line(*ahead)
    assert "minus that of one-expert, on the same images: +30.0 points (" in line
    assert line.endswith(": more robust")
    assert comparison_line(*reversed(ahead)).endswith(": less robust")
    assert "evaluated on other images" in comparison_line(ahead[0], with_flags("1"))
    assert "epsilon or norm differs" in comparison_line(ahead[0], with_flags(ahead[1].evaluation.flags, epsilon=0.5))
