"""Pre-training in Detectron2's engine: steps, schedules, hooks, state, ERF refresh."""
