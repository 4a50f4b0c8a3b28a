"""Weights made here, each with its card and the script that made it.

`python -m evalbench.models.zoo.train_NAME --data FOLDER` writes a weights file (float16 safetensors) and a card
(JSON: data, size, steps, seed, loss curve, quality reached with its N, sha256) beside itself.
"""
