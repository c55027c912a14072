"""What a run says about itself."""

import pytest

from fledge.training.run_record import tokens_per_second

LOGGED = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 2, "loss": 2.5, "num_tokens": 2_000.0},
    {"step": 4, "loss": 2.4, "num_tokens": 4_000.0},
    {"step": 6, "loss": 2.3, "num_tokens": 6_400.0},
    {"step": 6, "eval_loss": 2.2, "num_tokens": 6_400.0},
]


@pytest.mark.parametrize(
    ("parts", "speed"),
    [
        ([{"first_step": 0, "seconds": 4.0}], 1_600),
        ([{"first_step": 0, "seconds": 3.0}, {"first_step": 4, "seconds": 5.0}], 800),
        ([{"first_step": 0, "seconds": 3.0}, {"first_step": 3, "seconds": 5.0}], 800),  # no line for step 3
        ([{"first_step": 0}, {"first_step": 4, "seconds": 2.0}], 1_200),  # another program trained the first part
    ],
)
def test_speed_counts_the_tokens_of_the_parts_with_a_time(parts, speed):
    assert tokens_per_second(LOGGED, parts) == speed
