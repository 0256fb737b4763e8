from advmoe.sweep.schedule import deadline


def test_a_share_of_the_time_is_reserved_for_the_end():
    assert deadline(100.0, None) == float("inf")
    assert deadline(100.0, 9.0) == 100 + 540 - 20
    assert deadline(100.0, 1.0) == 100 + 60 - 10 - 3  # stopping may take 10 s
