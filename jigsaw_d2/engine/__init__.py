"""Pre-training in Detectron2's engine: the trainer, its step, its hooks, what a run resumes from."""
