"""Pre-training in Detectron2's engine: trainer, step, hooks, what a run resumes from."""
