"""What becomes of events in the join, by name."""

from __future__ import annotations

from typing import Literal

Outcome = Literal[
    # every served message has one of these
    "served",
    "served_duplicate",
    "served_late",  # its time to live is over already: a replay, not news
    # every feedback event has exactly one of these, once it is decided; a page has one for each of its items
    "impression",
    "click",
    "conversion_immediate",  # within the observation window: the first emission carries it
    "conversion_late",  # emitted as LATE_CONVERSION
    "duplicate",  # this kind was heard of before for this row: no effect
    "late_click",  # after the click window: the first emission says unclicked
    "conversion_without_click",  # or with a late click
    "conversion_after_attribution",
    "conversion_after_maturity",  # it would have counted, and came after its row had matured
    "impression_after_ttl",
    "click_without_impression",
    "conversion_without_impression",
    "item_not_served",  # the request is known, the item is not in its `served` message
    "after_ttl",  # the request had been forgotten but for its clicked rows
    "held_overflow",  # too many requests waiting for their `served`
    "expired_impression",  # `served` never came
    "expired_click",
    "expired_conversion",
    # candidates, not events
    "never_shown",
]
