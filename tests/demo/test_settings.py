"""Test the default sizes of the demo."""

from d2f_fast.demo.run import forward_passes
from d2f_fast.demo.settings import DemoSettings


def test_default_sizes_rise_from_the_untrained_network_and_from_one_evaluation() -> None:
    settings = DemoSettings()
    assert settings.curve_points == (0, 10, 20, 40, 80, 160)
    assert settings.evaluations == (1, 2, 4, 25)


def test_default_demo_makes_four_tenths_of_127_thousand_evaluations_at_most() -> None:
    assert forward_passes(DemoSettings()) <= 0.4 * 127_000
