"""What a run costs: days, chip-hours and money, and how often it should be saved."""

import math
from typing import Any

from scalegpt.planning import memory
from scalegpt.planning.plans import Plan

# A save waits for the copy to the host's memory, and for all processes to agree: a guess. What a
# host writes to its disk or bucket at, which decides how soon the next save may begin, is one, too.
AGREEMENT = 1.0
HOST_WRITES = 0.5e9


def costs(plan: Plan, price: float | None = None, preemption_hours: float = 24.0) -> dict[str, Any]:
    """Return the cost of all updates of a run, each as [least, likely, most], and of its saves.

    price: of a chip and hour. preemption_hours: the mean time between two preemptions. Evaluations
    and start-up are not counted. None where no speed is known.
    """
    config, seconds = plan.config, plan.run_seconds
    hours = seconds and [s / 3600 * plan.topology.chips for s in seconds]
    updates = config.optim.steps
    size = memory.checkpoint_bytes(config.model, config.optim, config.lora)
    run = {
        "updates": updates,
        "tokens": config.batch.rows_after(updates) * config.row_width,
        "days": seconds and [s / 86400 for s in seconds],
        "chip_hours": hours,
        "price": hours and [h * price for h in hours] if price is not None else None,
    }
    checkpoint = {"bytes": size, "preemption_hours": preemption_hours}
    if plan.step:
        checkpoint |= saving(plan, size, preemption_hours)
    return {"run": run, "checkpoint": checkpoint}


def saving(plan: Plan, size: int, preemption_hours: float) -> dict[str, float]:
    """Return how often to save, so that saving and repeated work together take the least time.

    That is every sqrt(2 x stall x mean time between preemptions) seconds (Young 1974), but not
    before the last save is written. lost: the share of the time that saving and repeating take.
    """
    topology = plan.topology
    stall = AGREEMENT + size / topology.chips / topology.chip.host_link
    writes = size / (topology.hosts * HOST_WRITES)
    between = preemption_hours * 3600
    interval = max(math.sqrt(2 * stall * between), writes)
    updates = min(plan.config.optim.steps, max(1, round(interval / plan.step[1])))
    interval = updates * plan.step[1]
    return {
        "stall_seconds": stall,
        "write_seconds": writes,
        "every_seconds": interval,
        "every_updates": updates,
        "lost": stall / interval + (interval / 2 + writes) / between,
    }
