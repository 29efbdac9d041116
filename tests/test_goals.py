"""The goals on a CUDA device are decided by figures: reached, missed, or not decided, and by how much."""

from __future__ import annotations

from typing import Any

import pytest
from goals import FAMILIES, counted, decided

SIZES = {"medium": 100, "long": 800, "stream": 9_000, "chunk": 1_000}


def row(what: str, seconds: float, rate: float, **more: Any) -> dict[str, Any]:
    return {"what": what, "forward_seconds": seconds, "backward_seconds": seconds, "tflops": rate, **more}


def report() -> dict[str, Any]:
    """Figures by which every goal is reached."""
    lengths = [
        row(f"{family}(9)", seconds, 70.0, length=length)
        for length, seconds in ((100, 1.0), (800, 8.8))
        for family in FAMILIES
    ]
    stream = [
        {"tokens": tokens, "worst": 1.0, "budget": 2.0, "nanoseconds_per_token": 5.0, "peak_bytes": 10}
        for tokens in (800, 4_000, 9_000)
    ]
    return {
        "sizes": SIZES,
        "dense": [
            row("longspan", 0.9, 100.0),
            row("PyTorch, flash", 1.0, 90.0),
            {"what": "PyTorch, cudnn", "refused": "RuntimeError"},
        ],
        "window": [
            row("longspan", 1.0, 85.0, planning_seconds=0.1),
            row("FlexAttention", 1.0, 85.0, planning_seconds=0.4),
        ],
        "lengths": lengths,
        "planning": [
            {"what": "S2(9)", "asked": "none", "planning_seconds": 0.05},
            {"what": "S2(9)", "asked": "flex", "planning_seconds": 9.0},
        ],
        "memory": [{"what": "SlidingWindow(9)", "peak_bytes": 7, "device_bytes": 10}],
        "stream": stream,
        "errors": [
            {"what": "S2(9)", "kernel": "chosen", "finite": True, "of_budget": 0.5},
            *(
                {"what": what, "kernel": kernel, **found}
                for kernel in ("triton", "flex")
                for what, found in (
                    ("S2(9)", {"finite": True, "of_budget": 0.5}),
                    ("BigBird(9)", {"refused": "PlanError"}),
                )
            ),
        ],
        "sanitizer": [{"what": "memcheck", "kernel": kernel, "errors": 0} for kernel in ("triton", "flash")],
    }


def verdicts(changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is said of the goals that are not reached."""
    found = decided(report() | changed)
    return {goal["goal"]: goal for goals in found.values() for goal in goals if goal["reached"] is not True}


def test_all_can_be_reached():
    assert verdicts({}) == {}
    found = decided(report())
    assert counted(found) == "28 goals reached, 0 missed, 0 not decided."
    dense = found["dense"][0]
    assert dense["found"] == pytest.approx(0.9) and dense["margin"] == pytest.approx(0.1)
    assert dense["verdict"] == (
        "reached by 10.0%: seconds of causal attention over those of PyTorch's fastest kernel: 0.9, wanted at most 1"
    )


@pytest.mark.parametrize(
    ("changed", "goal", "margin"),
    [
        (
            {"dense": [row("longspan", 1.2, 100.0), row("PyTorch, flash", 1.0, 100.0)]},
            "seconds of causal attention over those of PyTorch's fastest kernel",
            -0.2,
        ),
        # The dense rate is the best there is, PyTorch's too.
        (
            {"dense": [row("longspan", 1.0, 50.0), row("PyTorch, cudnn", 1.0, 125.0)]},
            "rate of a window over the dense rate",
            -0.15,
        ),
        # As fast, but for the plan.
        (
            {
                "window": [
                    row("longspan", 1.0, 85.0, planning_seconds=2.0),
                    row("FlexAttention", 1.0, 85.0, planning_seconds=0.0),
                ]
            },
            "seconds, planning too, over those of FlexAttention with its own mask",
            -1.0,
        ),
        (
            {
                "lengths": [
                    row("S2(9)", 1.0, 70.0, length=100),
                    row("S2(9)", 12.0, 70.0, length=800),
                ]
            },
            "seconds of a token of S2 at 800 over those at 100",
            -0.2,
        ),
        (
            {"planning": [{"what": "S2(9)", "asked": "none", "planning_seconds": 0.2}]},
            "most milliseconds that a plan of 800 takes",
            -1.0,
        ),
        (
            {"errors": [{"what": "S2(9)", "kernel": "flex", "finite": False, "of_budget": 3.0}]},
            "worst error of flex over its budget",
            -2.0,
        ),
        (
            {"sanitizer": [{"what": "memcheck", "kernel": "triton", "errors": 4}]},
            "errors that compute-sanitizer finds in triton",
            None,
        ),
    ],
)
def test_a_miss_says_by_how_much(changed: dict[str, Any], goal: str, margin: float | None):
    missed = verdicts(changed)[goal]
    assert missed["reached"] is False
    assert missed["margin"] == (None if margin is None else pytest.approx(margin))
    assert missed["verdict"].startswith("missed")


def test_what_did_not_run_has_missed():
    """Of the goal's own subject; without what it is held against nothing is known."""
    full = {"what": "longspan", "refused": "OutOfMemoryError: full"}
    found = verdicts({"window": [full, row("FlexAttention", 1.0, 85.0, planning_seconds=0.4)]})
    assert found["rate of a window over the dense rate"]["verdict"] == (
        "missed: rate of a window over the dense rate, wanted at least 0.8, but longspan did not run: "
        "OutOfMemoryError: full"
    )
    other = {"what": "FlexAttention", "refused": "OutOfMemoryError: full"}
    found = verdicts({"window": [row("longspan", 1.0, 85.0, planning_seconds=0.1), other]})
    (open_goal,) = found.values()
    assert open_goal["reached"] is None
    assert open_goal["verdict"].startswith("not decided: seconds, planning too")


def test_errors_are_decided_for_all_patterns_of_a_kernel():
    """A kernel may refuse a pattern, `attend` itself may not; and after a fault nobody knows of the others."""
    worst = {kernel: f"worst error of {kernel} over its budget" for kernel in ("chosen", "flex")}
    refused = [{"what": "Fixed(9)", "kernel": "chosen", "refused": "OutOfMemoryError"}]
    assert verdicts({"errors": report()["errors"] + refused})[worst["chosen"]]["reached"] is False
    fault = [{"what": "failed", "kernel": "flex", "refused": "errors:flex was stopped after 180 seconds"}]
    found = verdicts({"errors": report()["errors"] + fault})
    assert worst["chosen"] not in found
    assert found[worst["flex"]]["verdict"].endswith("but errors:flex was stopped after 180 seconds")


def test_plans_are_decided_once_those_of_attend_itself_are_made():
    stopped = {"what": "failed", "refused": "planning was stopped after 60 seconds"}
    plans = report()["planning"]
    assert verdicts({"planning": [*plans, stopped]}) == {}
    (found,) = verdicts({"planning": [plans[0], stopped]}).values()
    assert found["reached"] is None


def test_a_table_that_was_cut_off_decides_what_it_holds():
    found = verdicts({"stream": report()["stream"][:2], "dense": [], "lengths": report()["lengths"][:4]})
    assert found["worst error of a sampled query over its budget"]["reached"] is None
    assert found["rate of a window over the dense rate"]["verdict"].endswith(
        "but the table dense has no such row"
    )
    assert found["seconds of a token of S2 at 800 over those at 100"]["reached"] is None
    # Tables that were not made decide nothing, and are not spoken of.
    assert "dense" not in decided(report() | {"dense": []})
    assert decided({}) == {}
