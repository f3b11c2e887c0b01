"""Types that the pack's nodes hand to each other."""

from __future__ import annotations

from comfy_api.latest import io

T3PlanType = io.Custom("T3_PLAN")
