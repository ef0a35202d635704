"""The process, set up for the loop."""

import gc
import platform
import sys

from stream_scorer.wiring import runtime


def test_what_was_built_before_the_loop_is_not_collected_again() -> None:
    before, switch, threshold = gc.get_freeze_count(), sys.getswitchinterval(), gc.get_threshold()
    kept = [{at: [at]} for at in range(1_000)]
    try:
        runtime.settle()
        assert gc.get_freeze_count() >= before + len(kept)
        assert gc.get_threshold() == runtime.SCORING
        assert sys.getswitchinterval() <= 2 * runtime.SWITCH_S
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
        sys.setswitchinterval(switch)
    assert gc.get_freeze_count() == 0


def test_glibc_takes_both_thresholds() -> None:
    assert runtime.keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
