"""Where people look at runs while they train: the records of a run, on a terminal, in TensorBoard, in MLflow.

All of it is made of metrics.jsonl, which stays the one truth; nothing here knows of training.
"""
